"""Skip Tuning and full fine-tuning over the pre-training of the model: more or fewer steps than glyph-tiny had.

    python examples/pretrain_glyph_tiny.py --steps 1500 --out glyph-1500.safetensors
    python -m bench.when.pretraining 1500=glyph-1500.safetensors
    python -m bench.when.pretraining             print the table of the committed rows

Each model is given with its number of pre-training steps; the rows of the model in the package, with 4,500 steps, are
those of `python -m bench.when`. As there, settings are searched, here for each model; Skip Tuning has ω = ½. Runs with
a row in bench/results/DEVICE/when_pretraining.csv are not repeated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import measure, tables
from .rows import Rows
from .runs import Run, searched
from .summary import pretraining_table
from .tasks import SHIFTS

KIND = "when_pretraining"
METHODS = ("skip", "full")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no row yet, and print the table."""
    parser = measure.command(__doc__)
    names = [shift.name for shift in SHIFTS]
    parser.add_argument("models", nargs="*", type=_model, metavar="STEPS=FILE")
    parser.add_argument("--tasks", nargs="+", default=["new scripts", "new fonts", "both"], choices=names)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs beside each other")
    args = parser.parse_args(arguments)
    if missing := [str(file) for _, file in args.models if not file.is_file()]:
        parser.error(f"the file of a model must exist; there is no {missing[0]}.")
    found = [] if args.models else Rows(kind=KIND).runs
    for steps, weights in args.models:
        rows = Rows(save=not args.no_save, kind=KIND, where={"pretraining_steps": str(steps)})
        for shift in (shift for shift in SHIFTS if shift.name in args.tasks):
            rows.run(searched(shift, METHODS, weights=weights), args.workers, f"{steps} steps, {shift.name}, search")
            report = [
                Run(shift, method, rows.best(shift, method), "report", seed, weights=weights)
                for method in METHODS
                for seed in range(args.seeds)
            ]
            rows.run(report, args.workers, f"{steps} steps, {shift.name}, report")
        found += rows.runs
    tables.show(*pretraining_table(Rows().runs, found), "pre-training", width=150)
    return 0


def _model(text: str) -> tuple[int, Path]:
    steps, _, file = text.partition("=")
    if not steps.isdecimal() or not file:
        raise argparse.ArgumentTypeError(f"a model must be STEPS=FILE, such as 1500=FILE; got {text!r}.")
    return int(steps), Path(file)


if __name__ == "__main__":
    sys.exit(main())
