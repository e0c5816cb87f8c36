"""Benchmark of `pooled_attention`: the class token of images and the last token of prompts in the last block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from .. import peers
from . import CPU, OURS, Case, Random, case

SHAPES = ((4, 197, 12, 64), (32, 197, 12, 64), (4, 577, 16, 64), (26, 11, 8, 64), (1380, 11, 8, 64))  # B, N, H, E


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query[:, :, None], key.transpose(1, 2), value.transpose(1, 2))[:, :, 0]


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for B, N, H, E in SHAPES:
        yield case(
            f"B{B}-N{N}-H{H}-E{E}",
            {OURS: functional.pooled_attention, "eager": eager},
            reference.pooled_attention,
            [random(B, H, E), *random(B, N, 2, H, E).unbind(2)],  # as in a tower: two views of one projection
            [random(B, H, E)],
            # Keys and values are read twice and their gradients written; query and result have one row each.
            moved=(6 * B * N + 6 * B) * H * E * dtype.itemsize,
            flops=12 * B * N * H * E,
            target="≥ 1",
            peers=peers.attentions(device),
            adapt=lambda of: lambda query, key, value: of(query[:, None], key, value, causal=False)[:, 0],
        )
