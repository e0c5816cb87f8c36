"""Benchmark of `shared_prefix_attention`: 26 to 1,380 suffixes of five tokens after the prefix "a photo of a".

"eager" is causal attention over whole prompts, with the rows of the prefix computed for each class. "eager suffixes"
is causal attention over the prefix, then that of the queries of the suffixes with an explicit mask; xformers the same
with its own masks; the prefix keys are expanded.
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

    def function(packed: Tensor, **_: int) -> Tensor:
        prefix, suffixes = packed.unflatten(1, (3, H, E)).split([P, len(packed) - P])
        suffixes = suffixes.unflatten(0, (-1, S))
        prompts = torch.cat([prefix.expand(len(suffixes), *prefix.shape), suffixes], dim=1)  # [K, P + S, 3, H, E]
        query, key, value = prompts.unbind(2)
        out = attention(query if whole else suffixes[:, :, 0], key, value, causal=True)
        first = out[0, :P] if whole else attention(*prefix[None].unbind(2), causal=True)[0]
        return torch.cat([first, out[:, -S:].flatten(0, 1)]).flatten(1)

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
    for K in CLASSES:
        R = P + K * S
        yield case(
            f"K{K}-S{S}-P{P}-H{H}-E{E}",
            functions,
            reference.shared_prefix_attention,
            [random(R, 3 * H * E)],
            [random(R, H * E)],
            # Forward reads three widths of a row and writes one, backward reads four and writes three.
            moved=11 * R * H * E * dtype.itemsize,
            flops=2 * 7 * (K * S * (P + (S + 1) // 2) + P * (P + 1) // 2) * H * E,
            target="≥ 3",
            peers=peers.attentions(device),
            adapt=over_prompts,
            heads=H,
            prefix_length=P,
            max_length=S,
        )
