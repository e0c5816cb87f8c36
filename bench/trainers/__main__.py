"""Time and memory of SkipCLIP in the trainers of other libraries, against a plain module in the same trainer.

    python -m bench.trainers --trainer hugging_face --quick

Both train the same model, on the same batches, with the same optimizer. The plain module runs every layer on all 77
tokens of the selected classes, and freezes what is below the cut. Checks first that losses and weights of 20 steps are
the same on a small model with all classes; then times ViT-B/16, 500 classes, where losses and weights must be the same
too. The time of a step is from its beginning to that of the next, with the trainer's own work. `--quick` measures the
small model. Appends to bench/results/DEVICE/trainers.csv.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from typing import Any

from .. import measure, trainers
from ..rows import command, save
from .common import Difference, Problem, Record, compare, full_problem, small_problem

TRAINERS = tuple(
    each.name for each in pkgutil.iter_modules(trainers.__path__) if each.name not in ("common", "__main__")
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__)
    parser.add_argument("--trainer", nargs="+", choices=TRAINERS, default=TRAINERS, metavar="NAME", help="default: all")
    parser.add_argument("--quick", action="store_true", help="vit-tiny, without a measurement of ViT-B/16")
    args = parser.parse_args(arguments)
    args.device = measure.CPU
    for name in args.trainer:
        module: Any = importlib.import_module(f"{trainers.__name__}.{name}")
        for problem in (small_problem(), *([] if args.quick else [full_problem()])):
            records, off = compare(module.train, problem)
            print(f"{name}, {problem.name}, {problem.steps} steps: losses differ by {off.loss:.1e}, ", end="")
            print(f"weights by {off.weights:.1e} of how far they moved")
            if not off.is_small:
                sys.exit("the two implementations do not agree: no measurement")
        rows = [row(name, problem, which, each, off) for which, each in records.items()]
        for each in rows:
            print(f"{each['implementation']:12}{measure.shown(each)}")
        naive, ours = rows
        ratios = ours["p50_ms"] / naive["p50_ms"], ours["saved_mib"] / naive["saved_mib"]
        print(f"{ratios[0]:.2f} of the time, {ratios[1]:.2f} of the saved bytes")
        save(args, rows, "trainers")


def row(trainer: str, problem: Problem, which: str, record: Record, off: Difference) -> dict[str, Any]:
    """The row of a run."""
    return {
        "trainer": trainer,
        "implementation": which,
        "model": problem.name,
        "B": problem.batch_size,
        "C": len(problem.tokens),
        "K": record.kept,
        "skip_layers": problem.skip_layers,
        "precision": "fp32",
        "steps": problem.steps,
        **measure.milliseconds(record.seconds),
        "saved_mib": round(record.saved_bytes / 2**20, 2),
        "loss_difference": f"{off.loss:.1e}",
        "weight_difference": f"{off.weights:.1e}",
    }


if __name__ == "__main__":
    main()
