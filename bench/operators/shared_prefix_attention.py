"""Benchmark of `shared_prefix_attention`: 26 to 1,380 suffixes of five tokens after the prefix "a photo of a".

"eager" is causal attention over whole prompts, with the rows of the prefix computed for each class. "eager suffixes"
is causal attention over the prefix, then that of the queries of the suffixes with an explicit mask; xformers the same
with its own masks; the prefix keys are expanded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.ops.shared_prefix_attention import MAX_E

from .. import peers
from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .record import Call, Record, ids, on_meta

# K, S, P, H, E: classes, tokens of a suffix and of the prefix, heads and their width.
SHAPES = tuple((K, 5, 6, 8, 64) for K in (26, 77, 500, 1380))
# Prompts of classes, and suffixes and a prefix of several tiles with wide heads.
LAUNCHED = ((1380, 5, 6, 8, 64), (50, 40, 70, 10, 128))
# Suffixes within a tile and longer ones, with heads of every width that has a kernel, in steps of 8.
WIDTHS = [(50, S, P, 8, E) for E in range(8, MAX_E + 1, 8) for S, P in ((5, 6), (40, 70))]


def over_prompts(attention: Callable[..., Tensor], *, whole: bool = False) -> Callable[..., Tensor]:
    """Attention over keys and values of prompts, for the queries of the suffixes or of `whole` prompts."""

    def function(packed: Tensor, heads: int, prefix_length: int, max_length: int) -> Tensor:
        tokens = packed.unflatten(1, (3, heads, -1))
        prefix, suffixes = tokens[:prefix_length], tokens[prefix_length:].unflatten(0, (-1, max_length))
        prompts = torch.cat([prefix.expand(len(suffixes), *prefix.shape), suffixes], dim=1)  # [K, P + S, 3, H, E]
        query, key, value = prompts.unbind(2)
        out = attention(query if whole else suffixes[:, :, 0], key, value, causal=True)
        first = out[0, :prefix_length] if whole else attention(*prefix[None].unbind(2), causal=True)[0]
        return torch.cat([first, out[:, -max_length:].flatten(0, 1)]).flatten(1)

    return function


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """PyTorch's attention, [B, M, H, E]; with fewer queries than keys by an explicit mask."""
    M, N = query.shape[1], key.shape[1]
    visible = None if M == N else torch.ones(M, N, dtype=torch.bool, device=query.device).tril(N - M)
    parts = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*parts, visible, is_causal=causal and M == N).transpose(1, 2)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    functions = {OURS: functional.shared_prefix_attention, "eager": over_prompts(sdpa, whole=True)}
    functions |= {"eager suffixes": over_prompts(sdpa)}
    for K, S, P, H, E in SHAPES:
        packed = random(P + K * S, 3 * H * E)
        yield case(
            f"K{K}-S{S}-P{P}-H{H}-E{E}",
            functions,
            reference.shared_prefix_attention,
            Arguments([packed], [random(len(packed), H * E)], {"heads": H, "prefix_length": P, "max_length": S}),
            # Forward reads three widths of a row and writes one, backward reads four and writes three.
            Work(11 * packed.nbytes // 3, flops=7 * flops(packed.shape, H, P, None, S)),
            peers.adapted(peers.attentions(device), over_prompts),
        )


def launches_of_layout(dtype: torch.dtype) -> Iterator[Call]:
    """The prompts of a step on ImageNet; the dtype plays no part."""
    yield Call("K107-P5-R891", (ids(107), ids(1000), ids(1000), 5, 891))


def launches(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = LAUNCHED) -> Iterator[Call]:
    for K, S, P, H, E in shapes:
        packed = on_meta(P + K * S, 3 * H * E, dtype=dtype)
        for offsets in (None, ids(K + 1)):
            form = "" if offsets is None else "-packed"
            yield Call(f"K{K}-S{S}-P{P}-H{H}-E{E}{form}", (packed, H, P, offsets, S, E**-0.5))


def launches_backward(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = LAUNCHED) -> Iterator[Call]:
    for shape, (packed, H, *options) in launches(dtype, shapes):
        R, width = packed.shape
        d_out, lse = on_meta(R, width // 3, dtype=dtype), on_meta(R, H, dtype=torch.float64)
        yield Call(shape, (d_out, packed, lse, H, *options))


def flops(packed: torch.Size, heads: int, P: int, offsets: torch.Size | None, max_length: int, *_: float) -> int:
    """FLOPs of a product: a token attends to half of its sequence, on average; one of a suffix also to the prefix."""
    T = packed[0] - P
    length = T / (offsets[0] - 1) if offsets is not None else max_length
    return round(2 * (T * (P + (length + 1) / 2) + P * (P + 1) / 2) * (packed[1] // 3))


def flops_backward(d_out: torch.Size, packed: torch.Size, lse: torch.Size, *options: Any, **results: Any) -> int:
    """FLOPs of backward: five products."""
    return 5 * flops(packed, *options)


RECORD = Record(
    cases=cases,
    launches={
        "packed_layout": launches_of_layout,
        "shared_prefix_attention": launches,
        "shared_prefix_attention_backward": launches_backward,
    },
    widths={
        "shared_prefix_attention": functools.partial(launches, shapes=WIDTHS),
        "shared_prefix_attention_backward": functools.partial(launches_backward, shapes=WIDTHS),
    },
    small_calls={
        "shared_prefix_attention": lambda randn: (
            {"packed": randn(7, 24)},
            {"heads": 2, "prefix_length": 2, "offsets": torch.tensor([0, 2, 5]), "max_length": 3},
        )
    },
    flops={
        "shared_prefix_attention": lambda *shapes, **_: 2 * flops(*shapes),
        "shared_prefix_attention_backward": flops_backward,
    },
)
