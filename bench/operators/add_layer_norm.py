"""Benchmark of `add_layer_norm`: both towers of ViT-B/16, and rows four times as wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from .. import peers
from . import CPU, OURS, Case, Random, case

# Rows and width: tokens of four images; suffixes of 26 and of 788 classes, five tokens each.
SHAPES = ((4 * 197, 768), (4 * 197, 3072), (26 * 5, 512), (788 * 5, 512), (788 * 5, 2048))
EPS = 1e-5


def after_addition(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return x + residual, and a LayerNorm of this sum."""

    def function(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + residual
        return hidden, norm(hidden, weight, bias, EPS)

    return function


eager = after_addition(lambda hidden, *rest: F.layer_norm(hidden, hidden.shape[-1:], *rest))


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for T, W in SHAPES:
        yield case(
            f"T{T}-W{W}",
            {OURS: functional.add_layer_norm, "eager": eager},
            reference.add_layer_norm,
            [random(T, W), random(T, W), random(W), random(W)],
            [random(T, W), random(T, W)],
            # Forward reads two and writes two, backward reads three and writes one; weight, bias and their gradients.
            moved=(8 * T + 5) * W * dtype.itemsize,
            target="≥ 1.5" if dtype == torch.float32 else "≥ 2.5",
            peers=peers.layer_norms(device),
            adapt=after_addition,
        )
