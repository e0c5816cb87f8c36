"""The meta device in place of a GPU: the code takes the paths of a GPU, and whatever needs a host value raises.

with meta_as_gpu(): ...             run a step as on a GPU
with recording(...) as launches:    record the launches of Triton kernels, as they would be made on a GPU
with WithoutProducts(): ...         prepare a step on the CPU, where products take most of the time
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from skipkernels.ops import launching, registration

_aten = torch.ops.aten
PRODUCTS = {product.default for product in (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)}
_ATTENTION = F.scaled_dot_product_attention
_PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, F.linear}


def _call_as_on_a_gpu(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the fused attention of a GPU, and cast the inputs of matrix products under autocast."""
    if function is _ATTENTION and args[0].is_meta:
        query, key, value, *mask = args
        attention = torch.ops.aten._scaled_dot_product_efficient_attention
        with_lse, causal = torch.is_grad_enabled(), kwargs.get("is_causal", False)
        return attention(query, key, value, kwargs.get("attn_mask", *mask[:1]), with_lse, 0.0, causal)[0]
    if function in _PRODUCTS and args[0].is_meta and torch.is_autocast_enabled("meta"):
        dtype = torch.get_autocast_dtype("meta")
        args = tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in args)
    return function(*args, **kwargs)


class _AsOnAGpu(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call_as_on_a_gpu(function, *args, **kwargs or {})


def _as_on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: function(*("cpu" if x == "meta" else x for x in args))


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **options: Any):
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **options)


@contextlib.contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Let the meta device follow the autocast settings of the CPU, since it has none, and use a GPU's attention."""
    names = "is_autocast_enabled", "get_autocast_dtype"
    patches: dict[str, Any] = {name: _as_on_the_cpu(getattr(torch, name)) for name in names} | {"autocast": _Autocast}
    # PyTorch's nn.MultiheadAttention calls these within a function of its own, where a mode is off.
    called: dict[str, Callable[..., Any]] = {"linear": F.linear, "scaled_dot_product_attention": _ATTENTION}
    within: dict[str, Any] = {name: partial(_call_as_on_a_gpu, function) for name, function in called.items()}
    with mock.patch.multiple(torch, **patches), mock.patch.multiple(F, **within), _AsOnAGpu():
        yield


class WithoutProducts(TorchDispatchMode):
    """Replace matrix products by zeros."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in PRODUCTS:
            left, right = args[-2:]
            return left.new_zeros(*left.shape[:-1], right.shape[-1])
        return operator(*args, **kwargs or {})


# ---- launches of Triton kernels --------------------------------------------------------------------------------------

_KIB = 1024


class Architecture(NamedTuple):
    """Target: Triton's backend and name, threads per warp, and the largest shared memory (LDS) of a block in bytes.

    `has_matrix_units` is False where Triton does not use them.
    """

    backend: str
    arch: int | str
    warp_size: int
    block_shared: int
    has_matrix_units: bool = True


# From NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities", and AMD's CDNA3 and CDNA4 ISA guides.
ARCHITECTURES = {
    "sm_75": Architecture("cuda", 75, 32, 64 * _KIB, has_matrix_units=False),
    "sm_80": Architecture("cuda", 80, 32, 163 * _KIB),
    "sm_86": Architecture("cuda", 86, 32, 99 * _KIB),
    "sm_89": Architecture("cuda", 89, 32, 99 * _KIB),
    "sm_90": Architecture("cuda", 90, 32, 227 * _KIB),
    "sm_100": Architecture("cuda", 100, 32, 227 * _KIB),
    "sm_120": Architecture("cuda", 120, 32, 99 * _KIB),
    "gfx942": Architecture("hip", "gfx942", 64, 64 * _KIB),
    "gfx950": Architecture("hip", "gfx950", 64, 160 * _KIB),
}


class Launch(NamedTuple):
    """The arguments of one call of `launching.launch`."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    arguments: dict[str, Any]


@contextlib.contextmanager
def recording(architecture: Architecture) -> Iterator[list[Launch]]:
    """Record launches on the meta device in a list, as they would be made for this architecture."""
    launches: list[Launch] = []
    target = launching.Target(architecture.backend, architecture.arch)
    with (
        mock.patch.object(launching, "_run", lambda *launch: launches.append(Launch(*launch))),
        mock.patch.object(launching, "_target_of_gpu", lambda index: target),
    ):
        yield launches


def launches_of(op: str, arguments: Sequence[Any], architecture: Architecture) -> list[Launch]:
    """The kernels that one call of an operator with meta tensors launches."""
    with recording(architecture) as launches:
        registration.definitions[op].launch(*arguments)
    return launches
