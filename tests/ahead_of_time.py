"""Print what `bench.aot` and `bench.counts` find; tests/test_aot.py runs it in a process without the interpreter.

python -m tests.ahead_of_time FOLDER NAME …     run these functions, each in a forked process; FOLDER/NAME is its output
"""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch

from bench import aot, counts, tune
from bench.launches import ARCHITECTURES, CALLS, FAMILIES, Architecture, launches_of, recording
from bench.operators.record import on_meta
from skipkernels.ops.launching import launch, tl, triton


@triton.jit
def product_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    tl.store(y_ptr + offs[:, None] * BLOCK + offs[None, :], tl.dot(x, x, input_precision=PRECISION))


CASES = [
    ("sound", "sm_80", dict(BLOCK=32, PRECISION="tf32x3", num_warps=4)),
    ("sound", "gfx942", dict(BLOCK=32, PRECISION="ieee", num_warps=4)),
    ("no matrix units", "sm_80", dict(BLOCK=32, PRECISION="ieee", num_warps=4)),
    ("too few warps", "sm_80", dict(BLOCK=64, PRECISION="tf32x3", num_warps=1)),
    ("too few warps", "gfx942", dict(BLOCK=128, PRECISION="ieee", num_warps=1)),
]


def faults() -> None:
    x = on_meta(1, dtype=torch.float32)
    for case, target, options in CASES:
        architecture = ARCHITECTURES[target]
        with recording(architecture) as launches:
            launch(product_kernel, (1,), device=x.device, x_ptr=x, y_ptr=x, **options)
        (kernel,) = aot.kernels_of(launches, architecture)
        job = aot.Job("product", "1", "fp32", 0, target, (1,), kernel)
        print(f"{case}, {target}: {list(aot.problems_of(aot.compile_job(job)))}")  # noqa: T201


class Driver:
    """Replaces the driver of a GPU."""

    def __init__(self, target: Architecture):
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return aot.gpu_target(self.target)


def differences() -> None:
    compiled = []
    triton.JITFunction._do_compile = lambda kernel, key, signature, device, constants, options, attributes, warmup: (
        compiled.append((signature, constants, attributes, dict(options.__dict__)))
    )
    compared = 0
    for target in ("sm_90", "gfx942"):  # the signature of a kernel depends on the backend only
        architecture = ARCHITECTURES[target]
        triton.runtime.driver.set_active(Driver(architecture))
        for op, calls in CALLS.items():
            for call in calls(torch.bfloat16):
                for launched in launches_of(op, call.arguments, architecture):
                    launched.kernel.run(grid=launched.grid, warmup=True, **launched.arguments, **launched.options)
                    compared += 1
                    if compiled.pop() != aot.kernels_of([launched], architecture)[0][1:]:
                        print(f"{launched.kernel.fn.__name__} ({op}, {call.shape}, {target})")  # noqa: T201
    print(f"{compared} compared")  # noqa: T201


def kernels() -> None:
    sys.argv = "aot --check --quick --target sm_90 gfx942 --dtype bf16".split()
    with contextlib.suppress(SystemExit):  # the problems are printed
        aot.main()


def candidates() -> None:
    """The kernels that `bench.tune` compiles for other options of an entry."""
    options = {"BLOCK_C": 32, "BLOCK_J": 64, "num_warps": 2}
    for job in tune.jobs_of(FAMILIES["classes_at_ranks"], "bf16", "sm_80", ("class_at", None), options):
        print(job.kernel.function.fn.__name__, aot.constants_of(job), job.kernel.options["num_warps"])  # noqa: T201


def counts_of_a_step() -> None:
    with contextlib.suppress(SystemExit):
        counts.main(["--check", "--classes", "20"])  # `make counts` checks all


def printing(name: str, path: Path) -> None:
    """Run a function with its output in a file."""
    with path.open("w") as file, contextlib.redirect_stdout(file):
        globals()[name]()


if __name__ == "__main__":
    for name in sys.argv[2:]:  # forked: a function may change the state of its process
        process = multiprocessing.get_context("fork").Process(target=printing, args=(name, Path(sys.argv[1], name)))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
