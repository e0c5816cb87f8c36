"""Print what `bench.aot` finds in compiled kernels; tests/test_aot.py runs it in a process without the interpreter.

python -m tests.ahead_of_time faults          kernels with the faults that have to be found in machine code
python -m tests.ahead_of_time differences     where it would compile something else than a launch does
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch

from bench import aot
from bench.launches import CALLS, on_meta
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
        with aot.recording(aot.ARCHITECTURES[target]) as launches:
            launch(product_kernel, (1,), device=x.device, x_ptr=x, y_ptr=x, **options)
        backend = triton.compiler.compiler.make_backend(aot.gpu_target(target))
        job = aot.Job("product", "1", "fp32", 0, target, (1,), product_kernel, *aot.specialise(launches[0], backend))
        print(f"{case}, {target}: {list(aot.problems_of(aot.compile_job(job)))}")  # noqa: T201


class Driver:
    """Replaces the driver of a GPU."""

    def __init__(self, target: str):
        self.target = target

    def get_current_device(self) -> str:
        return self.target

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
    for target, architecture in aot.ARCHITECTURES.items():
        triton.runtime.driver.set_active(Driver(target))
        backend = triton.compiler.compiler.make_backend(aot.gpu_target(target))
        for op, calls in CALLS.items():
            for call in calls(torch.bfloat16):
                for launched in aot.record(op, call.arguments, architecture):
                    launched.kernel.run(grid=launched.grid, warmup=True, **launched.arguments, **launched.options)
                    compared += 1
                    if compiled.pop() != aot.specialise(launched, backend):
                        print(f"{launched.kernel.fn.__name__} ({op}, {call.shape}, {target})")  # noqa: T201
    print(f"{compared} compared")  # noqa: T201


def paths() -> None:
    aot.forget_paths()
    (job,) = aot.jobs_of(["class_scores"], ["gfx942"], ["bf16"], quick=True)
    source = triton.compiler.ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    assembly = triton.compile(source, target=aot.gpu_target(job.target), options=job.options).asm["amdgcn"]
    print([path in assembly for path in (inspect.getsourcefile(job.kernel.fn), job.kernel.file_name)])  # noqa: T201


if __name__ == "__main__":
    {"faults": faults, "differences": differences, "paths": paths}[sys.argv[1]]()
