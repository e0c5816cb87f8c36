"""Count the FLOPs of matrix products in a call, including our operators and attention.

PyTorch's counter has no formulas for its own attention on the CPU and for our operators; they are here. Norms,
activations, softmax and the optimizer are not counted: they are bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import skipkernels as sk

Shape = torch.Size


def flops_of(function: Callable[[], Any]) -> int:
    """FLOPs of one call.

    Example:
        >>> a, b = torch.zeros(2, 3), torch.zeros(3, 5)
        >>> flops_of(lambda: a @ b), flops_of(lambda: sk.functional.class_scores(a, b.T, torch.tensor([0, 0])))
        (60, 60)
    """
    sk.backends()  # registers the operators
    ours, aten = torch.ops.skipkernels, torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: 2 * _pairs(*shapes),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *shapes, **__: 5 * _pairs(*shapes),
        aten._native_multi_head_attention: _whole_attention,
        ours.class_sampled_ce: lambda image, *_, out_shape, **__: 2 * image.numel() * out_shape[3][0],
        ours.class_sampled_ce_backward: lambda _, image, *rest, **__: 4 * image.numel() * rest[5][0],
        ours.class_sampled_logits: lambda image, *_, out_shape, **__: 2 * image.numel() * out_shape[0][1],
        ours.class_sampled_logits_backward: lambda d_logits, image, *_, **__: 4 * image.numel() * d_logits[1],
        ours.class_scores: lambda image, prototypes, *_, **__: 2 * image.numel() * prototypes[0],
        ours.suffix_attention: lambda *arguments, **_: 2 * _suffix_pairs(*arguments),
        ours.suffix_attention_backward: lambda _, *arguments, **__: 5 * _suffix_pairs(*_without_results(arguments)),
        ours.pooled_attention: lambda query, key, *_, **__: 4 * key.numel(),
        ours.pooled_attention_backward: lambda _, query, key, *__, **___: 10 * key.numel(),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        function()
    return counter.get_total_flops()


# Attention has two products, scores and the weighted sum of values, and five in backward: the scores again, and the
# gradients of both by both their factors. Each is 2 operations for each pair of a query and a key, head and channel.


def _pairs(query: Shape, key: Shape, *_: Any) -> int:
    B, H, Q, E = query
    return 2 * B * H * Q * key[2] * E


def _whole_attention(query: Shape, key: Shape, value: Shape, W: int, heads: int, *_: Any, **__: Any) -> int:
    """FLOPs of `nn.MultiheadAttention` without gradients: three projections, attention, output projection."""
    B, Q, _ = query
    return 2 * B * Q * W * 4 * W + 4 * B * Q * key[1] * W


def _suffix_pairs(query: Shape, prefix_key: Shape, *rest: Any) -> int:
    """FLOPs of suffix attention: each token attends to the prefix and to half of its suffix, on average."""
    T, H, E = query
    offsets, longest = rest[3], rest[4]
    length = T / (offsets[0] - 1) if offsets is not None else longest
    return round(2 * T * H * E * (prefix_key[0] + (length + 1) / 2))


def _without_results(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of forward, from those of backward, which has the results between the tensors and the rest."""
    return *arguments[:5], *arguments[7:]
