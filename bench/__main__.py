"""Run a short form of all benchmarks; `make bench` calls it.

    python -m bench --budget 18m

Jobs run one after the other, each in a process of its own with a share of the time; unused time goes to the next job.
Each job prints its table and appends its rows to bench/results/DEVICE/ as soon as they are measured; cases without time
are reported. `python -m bench.report` then writes the tables and pictures of README.md and docs/. torch.compile
compiles one step here and no operators, which would take longer than everything else. The operators are timed by
pytest-benchmark.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from . import measure
from .budget import Budget, budget

STEP = "bench.step --rounds 3 --seconds 20"
# The jobs, the most important first, and their shares of 18 minutes.
JOBS = (
    (f"{STEP} --precision fp32 --classes 10 1000 21841 --implementation skipkernels published", 5.0),
    (f"{STEP} --precision fp32 --classes 50", 3.5),
    (f"{STEP} --precision bf16 --classes 50 1000 --implementation skipkernels published", 1.5),
    ("bench.epoch --shots 2 --tests 100 --implementation skipkernels published", 1.5),
    ("bench.infer --images 25 --classes 100 --rounds 2", 2.5),
    ("pytest bench/operators --benchmark-autosave -k 'not compiled'", 4.0),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if every job succeeded."""
    parser = measure.command(__doc__)
    parser.add_argument("--budget", type=budget, default=Budget(18 * 60), help="time for all of it, such as 9m")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # subprocess.run ends the running job
    console, failed = Console(), 0
    for number, (job, share) in enumerate(JOBS):
        shares = sum(each for _, each in JOBS[number:])
        seconds = args.budget.left * share / shares
        options = ["--budget", f"{seconds:.0f}s"] + ["--no-save"] * args.no_save
        console.rule(f"{number + 1} of {len(JOBS)}: python -m {job}, {seconds / 60:.1f} minutes at most")
        started = time.monotonic()
        code = subprocess.run([sys.executable, "-m", *shlex.split(job), *options], check=False).returncode
        failed += code != 0
        console.print(f"{'failed' if code else 'done'} after {(time.monotonic() - started) / 60:.1f} minutes")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
