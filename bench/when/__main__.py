"""When Skip Tuning is the method to use: accuracy and cost of methods on pictograms, with pictogram-tiny.

    python -m bench.when                         search and report on all tasks, about an hour on two cores
    python -m bench.when --tasks animals --seeds 1
    python -m bench.when --without-words FILE    also the tasks of known and unknown words
    python -m bench.when --drawings FILE         also the tasks of the file of recipes.pictograms.more
    python -m bench.when --cost --tasks all      accuracy over time, on a quiet machine
    python -m bench.when --steps --tasks all     time and memory of a step, on a quiet machine
    python -m bench.when --own --drawings FILE   own sets: a long tail, flags, tiles of photographs in scikit-image
    python -m bench.when --trials                changes of the default, on the names of the search
    python -m bench.report                       write the tables of the rows

`bench.when.tasks` has the tasks and `bench.when.plan` the methods; `docs/when.md` has the results, and
`docs/when-predictions.md` the predictions, made before the runs. The order of the work:

1. Search: settings of each method (optimizer and learning rates) with three seeds, on a fifth of the names, which no
   reported run has. The best mean of base and new counts; ω is a half.
2. Report: each method with its setting on each task, and Skip Tuning with ω of a quarter, a half and three quarters,
   with each seed. Blends have the mean of the weights before and after tuning (WiSE-FT).

Each run uses one thread; its rows are appended to bench/results/DEVICE/when.csv when it ends, and runs with a row are
not repeated. Runs share the machine, so their `train_s` is no measurement. --cost and --steps run seed 0, one process
after the other; --cost tests after each epoch (when_cost.csv), --steps trains for a few steps (when_steps.csv).

The FILE of --without-words has the weights of a model that was pre-trained without the 175 words of docs/pictograms.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from ..inputs import positive
from ..rows import command, latest_rows
from . import own, trials
from .plan import SEARCHES, reported, searched
from .pool import run_missing
from .runs import curve, execute, first_steps
from .tasks import SHIFTS, Shift


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__)
    names = [shift.name for shift in SHIFTS]
    given = "default: all for which the files are given"
    parser.add_argument("--tasks", nargs="+", default=(), choices=names, metavar="TASK", help=given)
    parser.add_argument("--methods", nargs="+", default=list(SEARCHES), choices=list(SEARCHES), metavar="METHOD")
    parser.add_argument("--seeds", type=positive, default=5)
    parser.add_argument("--workers", type=positive, default=2, help="runs beside each other")
    parser.add_argument("--without-words", type=Path, metavar="FILE")
    parser.add_argument("--drawings", type=Path, metavar="FILE")
    measured = parser.add_mutually_exclusive_group()
    measured.add_argument("--cost", action="store_true", help="measure accuracy over time with the chosen settings")
    measured.add_argument("--steps", action="store_true", help="measure time and memory of a step")
    measured.add_argument("--own", action="store_true", help="run the default and others on own sets")
    measured.add_argument("--trials", action="store_true", help="try changes of the default on the names of the search")
    args = parser.parse_args(arguments)
    for option, path in (("--without-words", args.without_words), ("--drawings", args.drawings)):
        if path and not path.is_file():
            parser.error(f"{option} must be a file; got {path}.")
    lacking = {shift: option for shift in SHIFTS if (option := option_lacking(shift, args))}
    left_out = [f"{shift.name} needs {option}" for shift, option in lacking.items() if shift.name in args.tasks]
    if left_out:
        parser.error(f"--tasks: {', '.join(left_out)}.")
    shifts = [shift for shift in SHIFTS if shift not in lacking and shift.name in (args.tasks or names)]
    if args.own:
        runs = own.planned(args.drawings, args.seeds)
        run_missing(runs, "when_own", own.execute, workers=args.workers, save=not args.no_save)
    elif args.trials:
        runs = trials.planned(latest_rows("when"))
        run_missing(runs, "when_trials", trials.execute, workers=args.workers, save=not args.no_save)
    else:
        run_study(shifts, args)


def option_lacking(shift: Shift, args: argparse.Namespace) -> str | None:
    """Option of the file that a task needs and that was not given, or None."""
    if shift.words != "all" and not args.without_words:
        return "--without-words"
    return "--drawings" if not shift.tasks and not args.drawings else None


def run_study(shifts: Sequence[Shift], args: argparse.Namespace) -> None:
    """Run what has no row, first the search, then the report or the measurements."""
    save, measures = not args.no_save, args.cost or args.steps
    rows = run_missing(searched(args.methods), "when", execute, workers=args.workers, save=save)
    report = []
    for seed, shift in itertools.product(range(1 if measures else args.seeds), shifts):
        files = {} if shift.words == "all" else {"weights": args.without_words}
        files |= {"drawings": args.drawings}
        report += reported(shift, seed, rows, args.methods, skip_slow=not args.steps, **files)
    if not measures:
        run_missing(report, "when", execute, workers=args.workers, save=save)
        return
    kind, measured = ("when_cost", curve) if args.cost else ("when_steps", first_steps)
    for run in report:
        if run.config().epochs and run.name != "auto":  # a linear probe has no steps, the default several trainings
            run_missing([run], kind, measured, save=save)  # in a process of its own, for its memory


if __name__ == "__main__":
    main()
