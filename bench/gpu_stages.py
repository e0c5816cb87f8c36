"""The stages of bench/gpu.sh: python -m bench.gpu_stages STAGE FOLDER SECONDS [--dry-run]"""

from __future__ import annotations

import atexit
import collections
import contextlib
import csv
import importlib.metadata
import itertools
import math
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skipkernels.ops import OPERATORS, launching, precompile
from tests.ops.small_calls import small_call

from . import measure
from .budget import Budget
from .gpu import ROOT, STAGES
from .operators import CPU, DTYPES, OURS, Case, cases_of
from .operators.gate import Gate


class Sizes(NamedTuple):
    """Sizes of the inputs, and the arguments of pytest."""

    device: str = "cuda"
    model: str = "ViT-B-16"
    skip_layers: int = 6
    batch: int = 4
    classes: tuple[int, ...] = (1000, 50)
    precisions: tuple[str, ...] = ("bf16", "fp32")
    operators: Sequence[str] = OPERATORS
    shapes: int = 99
    rounds: int = 50
    # A module that cannot be imported, for want of a package, must not stop the others. The trainers run on the CPU.
    tests: tuple[str, ...] = (
        *("-m", "gpu", "-n", "8", "--maxfail", "40", "--continue-on-collection-errors"),
        *("tests", "--ignore", "tests/integrations"),
    )
    benchmarks: tuple[str, ...] = ()


DRY = Sizes("cpu", "glyph-tiny", 3, 4, (20,), ("bf16",), ("class_scores", "add_layer_norm"), 1, 2)
_FEW = ("-k", "(class_scores or add_layer_norm) and not compiled", "--benchmark-max-time=0", "--benchmark-min-rounds=2")
DRY = DRY._replace(tests=("--version",), benchmarks=_FEW)


class Run:
    """The sizes, device, time and tables of a stage."""

    def __init__(self, out: Path, seconds: float, dry_run: bool):
        self.sizes, self.out = DRY if dry_run else Sizes(), out
        self.device, self.on_gpu = torch.device(self.sizes.device), not dry_run
        self.budget = Budget(seconds - 10 if seconds else math.inf)  # the rest is for start and end
        if dry_run:
            torch.compile = lambda function, **_: function
        elif seconds > 0:
            count_hits()

    def write(self, table: str, row: dict[str, Any]) -> None:
        """Append a row and print it; the file is complete after every row."""
        print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""), flush=True)
        with (self.out / f"{table}.csv").open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def cases(self, dtypes: Sequence[str], shapes: int) -> Iterator[tuple[str, str, Case]]:
        """Operator, dtype and a case while time is left, the first shape of every operator first."""
        kinds = [*itertools.product(self.sizes.operators, dtypes)]
        streams = {(op, dtype): cases_of(op, dtype, self.device) for op, dtype in kinds}
        for _, (op, dtype) in itertools.product(range(shapes), kinds):
            if (case := next(streams[op, dtype], None)) is not None:
                yield op, dtype, case
            if not self.budget.allows(2):
                return


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Print an error instead of raising it, unless the device is lost."""
    try:
        yield
    except torch.AcceleratorError:
        raise
    except Exception as error:
        print(f"{what}: failed", flush=True)
        traceback.print_exception(error)


def count_hits() -> None:
    """Print at the end how many kernels were in Triton's cache."""
    found = collections.Counter[bool]()
    launching.triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.update([cache_hit])
    atexit.register(lambda: print(f"Triton's cache: {found[True]} of {found.total()} kernels found", flush=True))


# ---- stages ----------------------------------------------------------------------------------------------------------


def machine(run: Run) -> None:
    """Versions, the GPU, and which tools are installed."""
    print({stage.tool[0]: shutil.which(stage.tool[0]) for stage in STAGES if stage.tool})
    print(*sorted(f"{each.name} {each.version}" for each in importlib.metadata.distributions()), sep=", ", flush=True)
    for show in (lambda: subprocess.run(["nvidia-smi"]), lambda: print(measure.machine(run.device))):
        with contextlib.suppress(FileNotFoundError):
            show()


def kernels(run: Run) -> None:
    """Errors of ours and eager against fp64, with poisoned memory."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for op, dtype, case in run.cases(("fp32", "bf16", "fp16"), run.sizes.shapes):
        with reported(f"{op}, {case.shape}, {dtype}"):
            case = case._replace(runs={name: case.runs[name] for name in (OURS, "eager")})
            gate = Gate(case, DTYPES[dtype], run.device)
            result = {"result": gate.error_of(OURS) or "ok", "worst_of_eager": f"{max(gate.bounds):.1e}"}
            run.write("kernels", {"op": op, "shape": case.shape, "dtype": dtype} | result)


def tests(run: Run) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "--tb", "short", "-p", "no:cacheprovider", *run.sizes.tests]
    return subprocess.run(command, cwd=ROOT).returncode


def smoke(run: Run) -> None:
    """A small call of every operator, forward and backward."""
    for op in run.sizes.operators:
        with reported(op):
            call = small_call(op).on(run.device)
            total = call.total(*(x.requires_grad_() for x in call.inputs))
            if call.inputs:
                total.backward()
            print(f"{op}: {total.item():.6f}", flush=True)


def operators(run: Run) -> int:
    """The microbenchmarks, as CUDA graphs."""
    command = [sys.executable, "-m", "pytest", "bench/operators", "-q", "-p", "no:cacheprovider"]
    command += [f"--device={run.device}", f"--shapes={run.sizes.shapes}", f"--budget={min(run.budget.left, 600):.0f}s"]
    command += [f"--benchmark-json={run.out.resolve() / 'operators.json'}", *run.sizes.benchmarks]
    return subprocess.run(command, cwd=ROOT).returncode


def prepare(run: Run) -> int:
    """Compile what the stages launch into Triton's cache, without a GPU; FOLDER is the name of the target."""
    architecture = precompile.ARCHITECTURES[run.out.name]
    run.sizes, run.device, run.on_gpu = run.sizes._replace(device="cpu"), CPU, False
    kernels = precompile.kernels_of(launches_of_stages(run, architecture), architecture)
    results = precompile.compile_all(kernels, architecture, title="compiling")
    problems = [result for result in results if result not in ("", precompile.CACHED)]
    triton = launching.triton
    print(f"{len(kernels)} kernels for {run.out.name} in {triton.knobs.cache.dir}, Triton {triton.__version__}, Python")
    print(sys.version, *problems, sep="\n")
    return len(problems)


def launches_of_stages(run: Run, architecture: precompile.Architecture) -> list[precompile.Launch]:
    """The launches of the stages, recorded on the CPU. On a GPU some differ: it packs prompts in another way."""
    from . import gpu_step

    with precompile.Recorder(architecture) as recorder:
        smoke(run)
        for _, _, case in run.cases(("fp32", "bf16", "fp16"), min(2, run.sizes.shapes)):
            case.prepare()
            case.runs[OURS]()
    for classes, precision in itertools.product(run.sizes.classes, run.sizes.precisions):
        training = gpu_step.Training(run, gpu_step.inputs_of(run, classes), precision)  # compares results: not recorded
        with recorder:
            training.clip.predict(training.features)
            training()
    return recorder.launches


def step(run: Run) -> None:
    """Training steps of a whole model."""
    from . import gpu_step  # imports open_clip, which takes seconds

    gpu_step.measure_steps(run)


def one_step(run: Run) -> None:
    """A step for a profiler."""
    from . import gpu_step

    gpu_step.one_step(run)


if __name__ == "__main__":
    name, out, seconds, *rest = sys.argv[1:]
    sys.exit(globals()[name](Run(Path(out), float(seconds), rest == ["--dry-run"])))
