"""Count the FLOPs of matrix products in a call, including our operators and attention.

PyTorch's counter has no formulas for `nn.MultiheadAttention` and, up to 2.13, for attention on the CPU, which are here,
and for our operators, which are in their records (`bench.operators.record`). Norms, activations, softmax and the
optimizer are not counted: they are bound by memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import skipkernels as sk

from .operators.record import records

Shape = torch.Size


def flops_of(function: Callable[[], Any]) -> int:
    """FLOPs of one call.

    Example:
        >>> a, b = torch.zeros(2, 3), torch.zeros(3, 5)
        >>> flops_of(lambda: a @ b), flops_of(lambda: sk.functional.class_scores(a, b.T, torch.tensor([0, 0])))
        (60, 60)
    """
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        function()
    return counter.get_total_flops()


@functools.cache
def formulas() -> dict[Any, Callable[..., int]]:
    """FLOPs of the operators that PyTorch's counter does not know, as functions of the shapes of their arguments."""
    sk.backends()  # registers the operators
    ours, aten = torch.ops.skipkernels, torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: 2 * _product_flops(*shapes),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *shapes, **__: 5 * _product_flops(*shapes),
        aten._native_multi_head_attention: _whole_self_attention,
        **{getattr(ours, name): flops for record in records().values() for name, flops in record.flops.items()},
    }


# Attention has two products, scores and the weighted sum of values, and five in backward: the scores again, and the
# gradients of both by both their factors. Each is 2 operations for each pair of a query and a key, head and channel. A
# causal mask leaves out no pair: PyTorch's counter does the same on a GPU.


def _product_flops(query: Shape, key: Shape, *_: Any) -> int:
    B, H, Q, E = query
    return 2 * B * H * Q * key[2] * E


def _whole_self_attention(query: Shape, _key: Shape, _value: Shape, W: int, heads: int, *_: Any, **__: Any) -> int:
    """FLOPs of the self-attention of `nn.MultiheadAttention` without gradients: four projections and two products."""
    B, Q, _ = query
    return 2 * B * Q * W * 4 * W + 4 * B * Q * Q * W
