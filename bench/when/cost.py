"""Time and memory of training of the methods of the study, one process at a time.

    python -m bench.when.cost                    3 tasks, 5 minutes on a quiet machine

Trains with the settings that `python -m bench.when` chose, with seed 0. `train_s` is the time of all steps, without the
features below the cut and without tests; `train_mib` is how far the resident memory rises while they run. Appends to
bench/results/DEVICE/when_cost.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from .. import measure, tables
from .rows import Rows, reported
from .runs import execute
from .summary import cost_table
from .tasks import EMOJI_FONT, SHIFTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append the rows."""
    parser = measure.command(__doc__)
    names = [shift.name for shift in SHIFTS]
    parser.add_argument("--tasks", nargs="+", default=["few classes", "both", "many classes"], choices=names)
    parser.add_argument("--emoji-font", type=Path, default=EMOJI_FONT)
    args = parser.parse_args(arguments)
    args.device, found = measure.CPU, Rows()
    runs = [run for shift in SHIFTS if shift.name in args.tasks for run in reported(shift, 0, args.emoji_font, found)]
    rows = []
    for run in track(runs, "training"):
        row, *_ = measure.in_new_process(execute, run)
        rows.append({name: row[name] for name in ("task", "method", "setting", "steps", "train_s", "train_mib")})
    tables.show(*cost_table([{name: str(value) for name, value in row.items()} for row in rows]))
    measure.save(args, rows, "when_cost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
