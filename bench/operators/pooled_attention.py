"""Benchmark of `pooled_attention`: the class token of images and the last token of prompts in the last block."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from .. import peers
from . import COMPILED, CPU, Case, compiled, random, with_gradients

SHAPES = ((4, 197, 12, 64), (32, 197, 12, 64), (4, 577, 16, 64), (26, 11, 8, 64), (1380, 11, 8, 64))  # B, N, H, E


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query[:, :, None], key.transpose(1, 2), value.transpose(1, 2))[:, :, 0]


def of_one(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A peer's attention for one query."""
    return lambda query, key, value: attention(query[:, None], key, value, causal=False)[:, 0]


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    for B, N, H, E in SHAPES:
        query = random(rng, B, H, E, dtype=dtype, device=device)
        # Keys and values as in a tower: two views of one projection.
        projection = random(rng, B, N, 2, H, E, dtype=dtype, device=device)
        parts = (query, *projection.unbind(2))
        inputs = [x.detach().requires_grad_() for x in parts]
        upstream = [random(rng, B, H, E, dtype=dtype, device=device)]
        exact = [x.detach().double().requires_grad_() for x in parts]

        def run(function, inputs=inputs, upstream=upstream):
            return with_gradients(lambda: [function(*inputs)], inputs, upstream)

        def of_peer(attention, run=run):
            return run(of_one(attention))

        yield Case(
            shape=f"B{B}-N{N}-H{H}-E{E}",
            runs={
                "skipkernels": run(functional.pooled_attention),
                "eager": run(eager),
                COMPILED: run(compiled(reference.pooled_attention)),
            },
            truth=run(reference.pooled_attention, exact, [x.double() for x in upstream]),
            # Keys and values are read twice and their gradients written; query and result have one row each.
            moved=(6 * B * N + 6 * B) * H * E * dtype.itemsize,
            flops=12 * B * N * H * E,
            target="≥ 1",
        ).with_peers(peers.attentions(device), of_peer)
