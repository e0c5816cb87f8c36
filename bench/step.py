"""A training step of SkipCLIP against the published step, or against full fine-tuning, of the same model and batch.

    python -m bench.step --model ViT-B-16 --batch 4 --classes 50
    python -m bench.step --precision bf16 --published-precision fp32      ours in bf16 against theirs in fp32
    python -m bench.step --against full --classes 500 --rounds 1          every layer, class and token, from images

Checks every gradient against the published step's first, then times forward and backward in turn, and counts the bytes
saved for backward. Appends to bench/results/DEVICE/step.csv.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import measure
from .inputs import PRECISIONS, random_inputs
from .training import agreeing_steps, full_fine_tuning, step_parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = step_parser(__doc__, rounds=7)
    options.add_argument("--against", choices=("published", "full"), default="published")
    options.add_argument("--published-precision", choices=PRECISIONS, help="of the other step; default: --precision")
    args = options.parse_args(arguments)
    other_precision = args.published_precision or args.precision

    inputs = random_inputs(args.model, args.batch, args.classes, args.device)
    ours, other = agreeing_steps(inputs, args.skip_layers, args.memory, args.precision, other_precision)
    if args.against == "full":
        other = full_fine_tuning(inputs, other_precision)

    steps = {step.name: step for step in (other, ours)}
    saved = {name: measure.saved_bytes(step.loss) for name, step in steps.items()}
    seconds = measure.time_alternately(steps, args.rounds, args.device)
    rows = []
    for name, step in steps.items():
        times = measure.milliseconds(seconds[name])
        rows.append(
            measure.machine(args.device)
            | {"step": name, "model": args.model, "B": args.batch, "C": args.classes, "K": step.K}
            | {"skip_layers": step.skip_layers, "precision": step.precision}
            | times
            | {"saved_mib": round(saved[name] / 2**20, 1)}
        )
        print(f"{name:23} {step.precision}  {measure.shown(times)}  {saved[name] / 2**20:8.1f} MiB saved")
    print(
        f"{measure.median_ratio(seconds[other.name], seconds[ours.name]):.2f} times faster (median of {args.rounds} "
        f"pairs), {saved[ours.name] / saved[other.name]:.1%} of the bytes; K = {ours.K} of {args.classes}"
    )
    if not args.no_save:
        print(f"appended to {measure.append_rows(rows, 'step')}")


if __name__ == "__main__":
    main()
