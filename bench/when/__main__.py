"""When Skip Tuning is the method to use: accuracy of methods on tasks that differ from the pre-training in known ways.

    python -m bench.when                         search and report on all tasks, about an hour on two cores
    python -m bench.when --tasks noise --seeds 1
    python -m bench.when --cost --tasks "few classes" both "many classes"      5 minutes on a quiet machine
    python -m bench.when --pretrained 1500=glyph-1500.safetensors --tasks "new scripts" "new fonts" both
    python -m bench.when --print                 the tables of the committed rows

The model is glyph-tiny. `bench.when.tasks` has the tasks; `docs/when.md` the predictions, made before the runs, and the
results. The order of the work on a task:

1. Search: four settings of each method (optimizer and learning rates, `bench.when.runs`) with one seed, on characters
   that no reported run has. The best mean of base and new on the validation images counts; ω is a half.
2. Report: each method with its setting, and Skip Tuning with ω of a quarter, a half and three quarters, with each seed.
   Blends have the mean of the weights before and after tuning (WiSE-FT).

Each run uses one thread; its rows are appended to bench/results/DEVICE/when.csv when it ends, and runs with a row are
not repeated. Runs share the machine, so their `train_s` is no measurement.

--cost trains with the chosen settings and seed 0, one process at a time (when_cost.csv): the time of all steps, without
the features below the cut and without tests, and how far the resident memory rises while they run.

--pretrained does the same with Skip Tuning, ω = ½, and full fine-tuning of a model with other numbers of pre-training
steps (when_pretraining.csv), which `examples/pretrain_glyph_tiny.py --steps 1500 --out FILE` makes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from skipkernels.app.data import InputError

from .. import measure, tables
from . import summary
from .rows import Rows, reported
from .runs import Run, execute, searched
from .tasks import EMOJI_FONT, SHIFTS, Shift

PRETRAINED_METHODS = ("skip", "full")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no row yet, and print the tables."""
    parser = measure.command(__doc__)
    names = [shift.name for shift in SHIFTS]
    parser.add_argument("--tasks", nargs="+", default=names, choices=names, metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs beside each other")
    parser.add_argument("--emoji-font", type=Path, default=EMOJI_FONT)
    parser.add_argument("--cost", action="store_true", help="measure time and memory with the chosen settings")
    parser.add_argument("--pretrained", nargs="+", type=_model, default=[], metavar="STEPS=FILE")
    parser.add_argument("--print", action="store_true", help="print the tables of the rows that there are")
    args = parser.parse_args(arguments)
    args.device = measure.CPU
    if missing := [str(file) for _, file in args.pretrained if not file.is_file()]:
        parser.error(f"--pretrained: the file of a model must exist; there is no {missing[0]}.")
    shifts = [shift for shift in SHIFTS if shift.name in args.tasks]
    try:
        if args.cost:
            measure_cost(shifts, args)
        elif args.pretrained:
            run_pretrained(shifts, args)
        elif not args.print:
            run_study(shifts, args)
    except InputError as error:
        parser.error(str(error))
    study = summary.Study(*(Rows(kind=kind).runs for kind in summary.Study._fields))
    for title, kind, table in summary.TABLES.values():
        if getattr(study, kind):
            tables.show(*table(study), title, width=190)
    return 0


def run_study(shifts: Sequence[Shift], args: argparse.Namespace) -> None:
    """Run what has no row, first the search, then the report."""
    found, font = Rows(save=not args.no_save), args.emoji_font
    search = [run for shift in shifts if shift.settings_of is None for run in searched(shift, emoji_font=font)]
    found.run(search, args.workers, "search")
    report = [run for shift in shifts for seed in range(args.seeds) for run in reported(shift, seed, font, found)]
    found.run(report, args.workers, "report")


def measure_cost(shifts: Sequence[Shift], args: argparse.Namespace) -> None:
    found, rows = Rows(), []
    runs = [run for shift in shifts for run in reported(shift, 0, args.emoji_font, found)]
    for run in track(runs, "training"):
        row, *_ = measure.in_new_process(execute, run)
        rows.append({name: row[name] for name in ("task", "method", "setting", "steps", "train_s", "train_mib")})
    measure.save(args, rows, "when_cost")


def run_pretrained(shifts: Sequence[Shift], args: argparse.Namespace) -> None:
    """Search and report for each model."""
    for steps, weights in args.pretrained:
        rows = Rows(save=not args.no_save, kind="when_pretraining", where={"pretraining_steps": str(steps)})
        for shift in shifts:
            search = searched(shift, PRETRAINED_METHODS, weights=weights)
            rows.run(search, args.workers, f"{steps} steps, {shift.name}, search")
            report = [
                Run(shift, method, rows.best(shift, method), "report", seed, weights=weights)
                for method in PRETRAINED_METHODS
                for seed in range(args.seeds)
            ]
            rows.run(report, args.workers, f"{steps} steps, {shift.name}, report")


def _model(text: str) -> tuple[int, Path]:
    steps, _, file = text.partition("=")
    if not steps.isdecimal() or not file:
        raise argparse.ArgumentTypeError(f"a model must be STEPS=FILE, such as 1500=FILE; got {text!r}.")
    return int(steps), Path(file)


if __name__ == "__main__":
    sys.exit(main())
