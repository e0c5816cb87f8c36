"""The meta device in place of a GPU: the code takes the paths of a GPU, and whatever needs a host value raises.

with meta_as_gpu(): ...      run a step as on a GPU
with WithoutProducts(): ...  prepare a step on the CPU, where products take most of the time
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}
_ATTENTION = F.scaled_dot_product_attention
# Matrix products of which autocast casts the inputs.
_CAST = (torch, "matmul"), (torch, "mm"), (Tensor, "matmul"), (Tensor, "__matmul__"), (Tensor, "mm"), (F, "linear")
# Functions that take the type of a device
_AUTOCAST = [(torch, name) for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype")]
_AUTOCAST.append((torch.amp, "is_autocast_available"))


def _casting(product: Callable[..., Any]) -> Callable[..., Any]:
    """A matrix product that casts its inputs under the autocast of the meta device."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if args[0].is_meta and torch.is_autocast_enabled("meta"):
            dtype = torch.get_autocast_dtype("meta")
            args = tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in args)
        return product(*args, **kwargs)

    return call


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """On the meta device, the fused attention of a GPU."""
    if not query.is_meta:
        return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    attend, keeps_lse = _aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
    return attend(query, key, value, attn_mask, keeps_lse, dropout_p, is_causal, scale=scale)[0]


def _as_on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: function(*("cpu" if x == "meta" else x for x in args), **options)


@contextlib.contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Let the meta device follow the autocast settings of the CPU, since it has none, and use a GPU's attention."""
    patches: list[tuple[Any, str, Any]] = [(owner, name, _casting(getattr(owner, name))) for owner, name in _CAST]
    patches += [(owner, name, _as_on_the_cpu(getattr(owner, name))) for owner, name in _AUTOCAST]
    patches.append((F, "scaled_dot_product_attention", _attention))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


class WithoutProducts(TorchDispatchMode):
    """Replace matrix products by zeros, except those in another dtype or into a given tensor."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket in PRODUCTS and operator is operator.overloadpacket.default:
            left, right = args[-2:]
            return left.new_zeros(*left.shape[:-1], right.shape[-1])
        return operator(*args, **kwargs or {})
