"""How the operators' Triton kernels are launched.

`launch` is the only way in: it puts a kernel on the device of its tensors and not on the current one, and writes out
each option that can change a result. What differs from one GPU to the next (block tables, the precision of a matrix
product) is looked up by `target`.

Where Triton is not installed the kernels stay plain functions that nobody launches: the reference serves.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not a Linux machine
    triton = types.SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))
    tl = None

__all__ = ["Target", "dot_precision", "installed", "launch", "target", "tl", "triton"]

installed = tl is not None


class Target(NamedTuple):
    """What machine code is made for: ("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942"), …"""

    backend: str
    arch: int | str


def target(device: torch.device) -> Target:
    """The target of a device; for the CPU, where Triton's interpreter runs the kernels, that of an A100."""
    return Target("cuda", 80) if device.type == "cpu" else _target_of_gpu(device.index)


@functools.lru_cache
def _target_of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.partition(":")[0])
    return Target("cuda", properties.major * 10 + properties.minor)


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of a `tl.dot` of tiles of this dtype: fp32 must come out as fp32, on the matrix units.

    NVIDIA's have no fp32: three tf32 products stand for one. AMD's have.
    """
    return "tf32x3" if dtype == torch.float32 and target(device).backend == "cuda" else "ieee"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    device: torch.device,
    num_warps: int,
    num_stages: int = 2,
    fp_fusion: bool = True,
    debug: bool = False,
    **arguments: Tensor | int | float | bool | str | None,
) -> None:
    """Launch a kernel, if there is anything to do.

    Args:
        kernel: decorated with `triton.jit`.
        grid: programs in each dimension, the largest number first: the others end at 65,535.
        device: that of the tensors.
        num_warps: of 32 threads (64 on AMD) a program.
        num_stages: of the software pipeline of its loops.
        fp_fusion: whether a · b + c may be rounded once, as the libraries do it; not where PyTorch's bits are wanted.
        debug: whether its `tl.device_assert`s are compiled in. They stop the device without the host waiting.
        arguments: the kernel's, by name.
    """
    if min(grid) == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _run(
            kernel,
            grid,
            dict(
                num_warps=num_warps,
                num_stages=num_stages,
                enable_fp_fusion=fp_fusion,
                debug=debug,
                sanitize_overflow=False,  # of every sum and product of integers, which debug would check too
            ),
            arguments,
        )


def _run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], arguments: dict[str, Any]) -> None:
    run: Callable[..., Any] = kernel[grid]
    run(**arguments, **options)
