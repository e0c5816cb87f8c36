"""Benchmark of `pooled_attention`: the class token of images and the last token of prompts in the last block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.ops.pooled_attention import MAX_WIDTH

from .. import peers
from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .record import Call, Record, on_meta

SHAPES = ((4, 197, 12, 64), (32, 197, 12, 64), (4, 577, 16, 64), (26, 11, 8, 64), (1380, 11, 8, 64))  # B, N, H, E


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    parts = query[:, :, None], key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(*parts, scale=scale)[:, :, 0]


def of_one_query(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The operator by a peer's attention."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query[:, None], key, value, causal=False)[:, 0]

    return function


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    for B, N, H, E in SHAPES:
        yield case(
            f"B{B}-N{N}-H{H}-E{E}",
            {OURS: functional.pooled_attention, "eager": eager},
            reference.pooled_attention,
            # As in a tower, key and value are two views of one projection.
            Arguments([random(B, H, E), *random(B, N, 2, H, E).unbind(2)], [random(B, H, E)]),
            # Keys and values are read twice and their gradients written; query and result have one row each.
            Work((6 * B * N + 6 * B) * H * E * dtype.itemsize, flops=12 * B * N * H * E),
            peers.adapted(peers.attentions(device), of_one_query),
        )


LAUNCHED = ((4, 197, 12, 64), (4, 577, 16, 80), (26, 11, 8, 32), (4, 50, 4, 256))


def launches(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = LAUNCHED) -> Iterator[Call]:
    for B, N, H, E in shapes:
        query, key = on_meta(B, H, E, dtype=dtype), on_meta(B, N, H, E, dtype=dtype)
        yield Call(f"B{B}-N{N}-H{H}-E{E}", (query, key, key, E**-0.5))


def launches_backward(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = LAUNCHED) -> Iterator[Call]:
    for shape, (query, key, value, scale) in launches(dtype, shapes):
        lse = on_meta(*query.shape[:2], dtype=torch.float64)
        yield Call(shape, (query, query, key, value, lse, scale, True, True, True))


WIDTHS = [(4, 50, 4, E) for E in (8, 32, 64, 96, 128, 192, 256, 384, 512, 768, MAX_WIDTH)]
RECORD = Record(
    cases=cases,
    launches={"pooled_attention": launches, "pooled_attention_backward": launches_backward},
    widths={
        "pooled_attention": functools.partial(launches, shapes=WIDTHS),
        "pooled_attention_backward": functools.partial(launches_backward, shapes=WIDTHS),
    },
    small_calls={
        "pooled_attention": lambda randn: (
            {"query": randn(2, 2, 4), "key": randn(2, 3, 2, 4), "value": randn(2, 3, 2, 4)},
            {},
        )
    },
    flops={
        "pooled_attention": lambda query, key, *_, **__: 4 * key.numel(),
        "pooled_attention_backward": lambda _, query, key, *__, **___: 10 * key.numel(),
    },
)
