"""Benchmark of `suffix_attention`: 26 to 1,380 suffixes of five tokens after the prefix "a photo of a".

"eager" is causal attention over whole prompts, with the rows of the prefix computed for each class. "eager suffixes"
has the queries of the suffixes only, with an explicit mask, and xformers with its own mask; the prefix keys are
expanded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from .. import peers
from . import CPU, OURS, Case, Random, case

S, P, H, E = 5, 6, 8, 64
CLASSES = (26, 77, 500, 1380)


def over_prompts(attention: Callable[..., Tensor], *, whole: bool = False) -> Callable[..., Tensor]:
    """Attention over keys and values of prompts, for the queries of the suffixes or of `whole` prompts."""

    def function(query: Tensor, prefix_key: Tensor, prefix_value: Tensor, *suffix: Tensor) -> Tensor:
        def behind(prefix: Tensor, suffix: Tensor) -> Tensor:
            return torch.cat([prefix.expand(suffix.shape[0], *prefix.shape), suffix], dim=1)

        # The queries of the prefix do not matter: their rows and gradients are dropped.
        query = behind(prefix_key.detach(), query) if whole else query
        out = attention(query, behind(prefix_key, suffix[0]), behind(prefix_value, suffix[1]), causal=True)
        return out[:, P:] if whole else out

    return function


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """PyTorch's attention, [B, M, H, E]; with fewer queries than keys by an explicit mask."""
    M, N = query.shape[1], key.shape[1]
    visible = None if M == N else torch.ones(M, N, dtype=torch.bool, device=query.device).tril(N - M)
    parts = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*parts, visible, is_causal=causal and M == N).transpose(1, 2)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    random = Random(dtype, device)
    functions = {OURS: functional.suffix_attention, "eager": over_prompts(sdpa, whole=True)}
    functions |= {"eager suffixes": over_prompts(sdpa)}
    for K in CLASSES:
        # As in a tower: parts of one projection, of the prefix and of the suffixes.
        prefix, (query, *suffix) = random(P, 3, H, E), random(K, S, 3, H, E).unbind(2)
        yield case(
            f"K{K}-S{S}-P{P}-H{H}-E{E}",
            functions,
            reference.suffix_attention,
            [query, prefix[:, 1], prefix[:, 2], *suffix],
            [random(K, S, H, E)],
            # Of the suffixes: forward reads three and writes one, backward reads four and writes three; the prefix's
            # two are read twice, and their gradients written.
            moved=(11 * K * S + 6 * P) * H * E * dtype.itemsize,
            flops=2 * 7 * K * S * (P + (S + 1) // 2) * H * E,
            target="≥ 3",
            peers=peers.attentions(device),
            adapt=over_prompts,
        )
