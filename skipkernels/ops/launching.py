"""Launches of the Triton kernels of the operators.

All kernels are launched by `launch`, on the device of their tensors, which need not be the current device, with every
option that can change a result. Without Triton, the reference implementation is used.
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

__all__ = [
    "Target",
    "constexpr",
    "current_stream",
    "dot_precision",
    "installed",
    "launch",
    "products_widen",
    "runs_beside_host",
    "target",
    "tl",
    "triton",
]

installed = tl is not None
constexpr = tl.constexpr if installed else int  # a constant of a module that kernels read


class Target(NamedTuple):
    """Target of compilation: ("cuda", 80), ("cuda", 90), ("cuda", 100), ("hip", "gfx942"), …"""

    backend: str
    arch: int | str


def target(device: torch.device) -> Target:
    """Return the target of a device; for the CPU, where the interpreter of Triton runs the kernels, that of an A100."""
    return Target("cuda", 80) if device.type == "cpu" else _target_of_gpu(device.index)


@functools.lru_cache
def _target_of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.partition(":")[0])
    return Target("cuda", properties.major * 10 + properties.minor)


def runs_beside_host(device: torch.device) -> bool:
    """Return True if the kernels of a device run after the call that launches them: not those of a CPU."""
    return device.type != "cpu"


def current_stream(device: torch.device) -> int:
    """Return the id of the stream on which a device runs the next kernel; in a hook, that of the gradient."""
    return torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of a `tl.dot` with fp32 accuracy: three products in tf32 on NVIDIA, fp32 on AMD."""
    return "tf32x3" if dtype == torch.float32 and target(device).backend == "cuda" else "ieee"


@functools.cache  # tried once in a process
def products_widen(device_type: str) -> bool:
    """Return True if a device can write a product of 16-bit matrices in fp32; known by trying."""
    try:
        one = torch.ones(8, 8, dtype=torch.bfloat16, device=device_type)
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except TypeError:
        return False
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):  # says nothing about products
            raise
        return False


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    device: torch.device,
    num_warps: int,
    num_stages: int = 2,
    fp_fusion: bool = True,
    debug: bool = False,
    **arguments: Tensor | int | float | bool | str | tuple[Any, ...] | None,
) -> None:
    """Launch a kernel with arguments by name, on the device of its tensors, unless the grid is empty.

    The largest dimension of the grid comes first: the limit of the others is 65,535. A warp has 32 threads, 64 on
    AMD. fp_fusion allows a · b + c to be rounded once; False gives the bits of PyTorch. debug compiles
    `tl.device_assert`s, which stop the device without a host sync.
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
                sanitize_overflow=False,  # debug would check every integer operation for overflow
            ),
            arguments,
        )


def _run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], arguments: dict[str, Any]) -> None:
    run: Callable[..., Any] = kernel[grid]
    run(**arguments, **options)
