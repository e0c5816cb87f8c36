"""When Skip Tuning is the method to use: accuracy of methods on tasks that differ from the pre-training in known ways.

    python -m bench.when                         search and report on all tasks, about an hour on two cores
    python -m bench.when --tasks noise --seeds 1
    python -m bench.when --print                 the tables of the committed rows

The model is glyph-tiny. `bench.when.tasks` has the tasks; `docs/when.md` the predictions, made before the runs, and the
results. The order of the work on a task:

1. Search: four settings of each method (optimizer and learning rates, `bench.when.runs`) with one seed, on characters
   that no reported run has. The best mean of base and new on the validation images counts; ω is a half.
2. Report: each method with its setting, and Skip Tuning with ω of a quarter, a half and three quarters, with each seed.
   Blends have the mean of the weights before and after tuning (WiSE-FT).

Each run uses one thread; its rows are appended to bench/results/DEVICE/when.csv when it ends, and runs with a row are
not repeated. Runs share the machine, so their `train_s` is no measurement: `bench.when.cost` has time and memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from skipkernels.app.data import InputError

from .. import measure, tables
from . import summary
from .rows import Rows, reported
from .runs import searched
from .tasks import EMOJI_FONT, SHIFTS, Shift


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what has no row yet, and print the tables."""
    parser = measure.command(__doc__)
    names = [shift.name for shift in SHIFTS]
    parser.add_argument("--tasks", nargs="+", default=names, choices=names, metavar="TASK")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="runs beside each other")
    parser.add_argument("--emoji-font", type=Path, default=EMOJI_FONT)
    parser.add_argument("--print", action="store_true", help="print the tables of the rows that there are")
    args = parser.parse_args(arguments)
    shifts = [shift for shift in SHIFTS if shift.name in args.tasks]
    found = Rows(save=not args.no_save)
    if not args.print:
        try:
            run_all(shifts, args, found)
        except InputError as error:
            parser.error(str(error))
    study = summary.Study(found.runs, [], [])
    for title, kind, table in summary.TABLES.values():
        if getattr(study, kind):
            tables.show(*table(study), title, width=190)
    return 0


def run_all(shifts: Sequence[Shift], args: argparse.Namespace, found: Rows) -> None:
    """Run what has no row, first the search, then the report."""
    font = args.emoji_font
    search = [run for shift in shifts if shift.settings_of is None for run in searched(shift, emoji_font=font)]
    found.run(search, args.workers, "search")
    report = [run for shift in shifts for seed in range(args.seeds) for run in reported(shift, seed, font, found)]
    found.run(report, args.workers, "report")


if __name__ == "__main__":
    sys.exit(main())
