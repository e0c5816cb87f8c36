"""Time and memory of `skipkernels tune`, which compares candidates, beside Skip Tuning alone.

    python -m bench.default               three rounds on the packaged drawings, about three minutes
    python -m bench.default --rounds 1

The commands run in turn, each in a process of its own, from its start to its end: the time includes the import of
PyTorch, the test and the report. Memory is the largest resident set of the process.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .inputs import positive
from .measure import CPU
from .rows import command, save

COMMANDS = {"the default": (), "Skip Tuning": ("--method", "skip")}
"""Options of `skipkernels tune` by the name in the table."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.set_defaults(device=CPU)
    args = parser.parse_args(arguments)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(args.rounds):
        for name, options in COMMANDS.items():
            found[name].append(run(options))
            print(f"{name:12} {found[name][-1][0]:5.1f} s  {found[name][-1][1]:5.0f} MiB", flush=True)
    rows = []
    for name, runs in found.items():
        seconds, peaks = zip(*runs, strict=True)
        row = {"command": " ".join(("skipkernels tune", *COMMANDS[name])), "name": name, "rounds": args.rounds}
        row |= {"p50_s": round(statistics.median(seconds), 1), "peak_mib": round(statistics.median(peaks))}
        rows.append(row)
    save(args, rows, "default")


def run(options: Sequence[str]) -> tuple[float, float]:
    """Run `skipkernels tune` on the CPU in a process, and return its seconds and its peak in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*options, "--device", str(CPU), "--out", str(Path(folder, "run"))]
        line = [sys.executable, "-m", "skipkernels", "tune", *options]
        begin = time.perf_counter()
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)  # resources of this child alone
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)  # unknown to Popen, which did not wait
    if status:
        raise SystemExit(f"{' '.join(line)} failed: run it to see why")
    return seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
