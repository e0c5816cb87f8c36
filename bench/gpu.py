"""Check and time everything on a GPU, unattended, in at most nine minutes. Started by bench/gpu.sh.

    bench/gpu.sh                      all stages; results go to $OUT (default: gpu-results), at most eight files
    bench/gpu.sh --only step ncu      some stages
    bench/gpu.sh --dry-run            every stage on the CPU, with a tiny model and stand-ins for the tools of CUDA

Each stage (bench/gpu_stages.py) is a process with a time limit. One that is cut off leaves the rows that it has
written.

    machine      versions and devices                                                                      log.txt
    kernels      every operator and dtype against fp64, with uninitialised memory filled with NaN          kernels.csv
    step         a step of ViT-B/16: gradients against fp64, no host sync, capture, replay = eager; time   step.csv
                 and the kernels that take longest                                                         slowest.csv
    tests        pytest -m gpu, in parallel                                                                tests.txt
    memcheck     compute-sanitizer on a small call of every operator                                       sanitizer.txt
    racecheck    the same for races on shared memory                                                       sanitizer.txt
    operators    CUDA graphs of every operator, rotating inputs, against eager, peers, torch.compile      operators.json
    ncu          Nsight Compute on the kernels that take longest in a step                                 ncu.txt
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TOTAL = 530  # seconds; bench/gpu.sh ends everything after 540
_SLOWEST = 10  # kernels that are profiled


class Stage(NamedTuple):
    """A stage.

    Attributes:
        seconds: Its time, to which is added what earlier stages leave.
        tool: Program in front of its process.
        runs: Its function in bench/gpu_stages.py, if that has another name.
        file: File of its output.
    """

    name: str
    seconds: int
    tool: tuple[str, ...] = ()
    runs: str = ""
    file: str = "log.txt"


STAGES = (
    Stage("machine", 10),
    Stage("kernels", 60),
    Stage("step", 200),
    Stage("tests", 90, file="tests.txt"),
    Stage("memcheck", 40, ("compute-sanitizer", "--tool", "memcheck"), "smoke", "sanitizer.txt"),
    Stage("racecheck", 40, ("compute-sanitizer", "--tool", "racecheck"), "smoke", "sanitizer.txt"),
    Stage("operators", 60),
    Stage("ncu", 30, ("ncu", "--clock-control", "none"), "one_step", "ncu.txt"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with stand-ins")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="only these stages")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="default: $OUT")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started, allotted = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        if args.dry_run:
            make_stand_ins(Path(folder))
        for stage in STAGES:
            allotted += stage.seconds
            if not args.only or stage.name in args.only:
                run_stage(stage, args, (TOTAL if args.only else allotted) - (time.monotonic() - started))


def run_stage(stage: Stage, args: argparse.Namespace, seconds: float) -> None:
    """Run a stage and append how it ended to log.txt."""
    started, compiled, ended = time.monotonic(), compiled_kernels(), "not run: no time left"
    if stage.tool and shutil.which(stage.tool[0]) is None:
        ended = f"not run: {stage.tool[0]} is not installed"
    elif seconds > 5:
        arguments = [*stage.tool, *(selection(args.out) if stage.name == "ncu" else [])]
        arguments += [sys.executable, "-m", "bench.gpu_stages", stage.runs or stage.name, str(args.out), str(seconds)]
        with (args.out / stage.file).open("a") as output:
            print(f"==== {stage.name}", file=output, flush=True)
            ended = run_limited([*arguments, *["--dry-run"] * args.dry_run], output, seconds)
    wall, compiled = time.monotonic() - started, compiled_kernels() - compiled
    line = f"{stage.name}: {ended}, {wall:.1f} s of {seconds:.0f}, {compiled} kernels compiled"
    print(line, flush=True)
    with (args.out / "log.txt").open("a") as log:
        print(line, file=log)


def run_limited(command: list[str], output: Any, seconds: float) -> str:
    """Run a command for at most this time: interrupt it, so that it can end with a report, then kill its processes."""
    # The sanitizer sees allocations only if PyTorch does not keep freed memory.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "--tool" in command else None
    streams: Any = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **streams)
    cut_off = ""
    for number, wait in ((signal.SIGINT, seconds - 3), (signal.SIGKILL, 3)):
        try:
            return f"exit status {process.wait(wait)}{cut_off}"
        except subprocess.TimeoutExpired:
            cut_off = ", cut off"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
    process.wait()
    return "killed"


def compiled_kernels() -> int:
    """Number of kernels in Triton's cache."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return sum(1 for _ in folder.glob("*/*.cubin"))


def selection(out: Path) -> list[str]:
    """Options of Nsight Compute that select the kernels of ours that take longest."""
    path = out / "slowest.csv"
    rows = [*csv.DictReader(path.open())] if path.exists() else []
    names = [row["kernel"] for row in rows if row["ours"] == "1"][:_SLOWEST] or ["_.*_kernel"]
    return ["--kernel-name", f"regex:^({'|'.join(names)})$", "--launch-count", str(4 * _SLOWEST)]


def make_stand_ins(folder: Path) -> None:
    """Put programs in front of the PATH that print their arguments and run the command behind them."""
    for name in {stage.tool[0] for stage in STAGES if stage.tool}:
        path = folder / name
        path.write_text(
            f'#!/bin/sh\necho "stand-in $*"\nwhile [ "$1" != {sys.executable} ]; do shift; done\nexec "$@"\n'
        )
        path.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


if __name__ == "__main__":
    main()
