"""Kernels with the faults that `bench.aot` has to find in machine code; prints what it finds.

python -m tests.faulty_kernels          without TRITON_INTERPRET
"""

from __future__ import annotations

import torch

from bench import aot
from bench.launches import on_meta
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


def main() -> None:
    x = on_meta(1, dtype=torch.float32)
    for case, target, options in CASES:
        with aot.recording(aot.ARCHITECTURES[target]) as launches:
            launch(product_kernel, (1,), device=x.device, x_ptr=x, y_ptr=x, **options)
        backend = triton.compiler.compiler.make_backend(aot.gpu_target(target))
        job = aot.Job("product", "1", "fp32", 0, target, (1,), product_kernel, *aot.specialise(launches[0], backend))
        problems = list(aot.problems_of(aot.compile_job(job)))
        print(f"{case}, {target}: {problems}")  # noqa: T201


if __name__ == "__main__":
    main()
