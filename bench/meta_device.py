"""The meta device in place of a GPU: the code takes the paths of a GPU, and whatever needs a host value raises.

with meta_as_gpu(): ...      run a step as on a GPU
with WithoutProducts(): ...  prepare a step on the CPU, where products take most of the time
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}
_ATTENTION = F.scaled_dot_product_attention
_CAST = {torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, F.linear}  # their inputs, by autocast


def _call_as_on_a_gpu(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the fused attention of a GPU, and cast the inputs of matrix products under autocast."""
    if function is _ATTENTION and args[0].is_meta:
        query, key, value, *mask = args
        attention = torch.ops.aten._scaled_dot_product_efficient_attention
        with_lse, causal, scale = torch.is_grad_enabled(), kwargs.get("is_causal", False), kwargs.get("scale")
        return attention(query, key, value, kwargs.get("attn_mask", *mask[:1]), with_lse, 0.0, causal, scale=scale)[0]
    if function in _CAST and args[0].is_meta and torch.is_autocast_enabled("meta"):
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
    """Replace matrix products by zeros, except those in another dtype or into a given tensor."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket in PRODUCTS and operator is operator.overloadpacket.default:
            left, right = args[-2:]
            return left.new_zeros(*left.shape[:-1], right.shape[-1])
        return operator(*args, **kwargs or {})
