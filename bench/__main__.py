"""How skipkernels compares with what one would use in its place, in one go: what `make bench` runs.

    python -m bench --budget 18m

The operators, a step over the number of classes, inference, and a whole epoch, one after the other, each in a process
of its own and with its share of the time. Each prints its table and keeps each of its rows as soon as it is measured,
in bench/results/DEVICE/; what there was no time for is said. `python -m bench.report` then makes the
tables of README.md and docs/ and the pictures from all rows that are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from .budget import Budget, budget

# What is run, and its share of the time.
JOBS = (
    ("bench.run --seconds 1", 4),
    ("bench.step --classes 10 100 1000 21841 --rounds 3 --seconds 30", 9),
    ("bench.infer --classes 10 100 1000 --rounds 2 --longest 30", 2),
    ("bench.epoch --who skipkernels published --shots 2 --tests 100", 2),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all that was begun ended well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=budget, default=Budget(18 * 60), help="time for all of it, such as 9m")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    console, failed = Console(), 0
    for number, (job, share) in enumerate(JOBS):
        shares = sum(each for _, each in JOBS[number:])
        seconds = args.budget.left * share / shares
        command = [sys.executable, "-m", *job.split(), "--budget", f"{seconds:.0f}s"] + ["--no-save"] * args.no_save
        console.rule(f"{number + 1} of {len(JOBS)}: python -m {job}, {seconds / 60:.1f} minutes at most")
        started = time.monotonic()
        code = subprocess.run(command, check=False).returncode
        failed += code != 0
        console.print(f"{'failed' if code else 'done'} after {(time.monotonic() - started) / 60:.1f} minutes")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
