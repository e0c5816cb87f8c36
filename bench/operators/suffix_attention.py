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
from . import COMPILED, CPU, Case, compiled, random, with_gradients

S, P, H, E = 5, 6, 8, 64
CLASSES = (26, 77, 500, 1380)


def eager(query: Tensor, prefix_key: Tensor, prefix_value: Tensor, suffix_key: Tensor, suffix_value: Tensor) -> Tensor:
    P = prefix_key.shape[0]
    # The queries of the prefix do not matter: their rows and gradients are dropped.
    whole = _behind(prefix_key.detach(), query)
    key, value = _behind(prefix_key, suffix_key), _behind(prefix_value, suffix_value)
    whole, key, value = (x.transpose(1, 2) for x in (whole, key, value))
    out = F.scaled_dot_product_attention(whole, key, value, is_causal=True)
    return out.transpose(1, 2)[:, P:]


def eager_suffixes(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, suffix_key: Tensor, suffix_value: Tensor
) -> Tensor:
    S, P = query.shape[1], prefix_key.shape[0]
    key, value = _behind(prefix_key, suffix_key), _behind(prefix_value, suffix_value)
    visible = torch.ones(S, P + S, dtype=torch.bool, device=query.device).tril(P)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return out.transpose(1, 2)


def behind_prefix(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A peer's attention for the queries of the suffixes."""

    def function(
        query: Tensor, prefix_key: Tensor, prefix_value: Tensor, suffix_key: Tensor, suffix_value: Tensor
    ) -> Tensor:
        key, value = _behind(prefix_key, suffix_key), _behind(prefix_value, suffix_value)
        return attention(query, key, value, causal=True)

    return function


def _behind(prefix: Tensor, suffix: Tensor) -> Tensor:
    return torch.cat([prefix.expand(suffix.shape[0], *prefix.shape), suffix], dim=1)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    for K in CLASSES:
        # As in a tower: parts of one projection, of the prefix and of the suffixes.
        prefix = random(rng, P, 3, H, E, dtype=dtype, device=device)
        suffix = random(rng, K, S, 3, H, E, dtype=dtype, device=device)
        query, suffix_key, suffix_value = suffix.unbind(2)
        parts = (query, prefix[:, 1], prefix[:, 2], suffix_key, suffix_value)
        inputs = [x.detach().requires_grad_() for x in parts]
        upstream = [random(rng, K, S, H, E, dtype=dtype, device=device)]
        exact = [x.detach().double().requires_grad_() for x in parts]

        def run(function, inputs=inputs, upstream=upstream):
            return with_gradients(lambda: [function(*inputs)], inputs, upstream)

        def of_peer(attention, run=run):
            return run(behind_prefix(attention))

        yield Case(
            shape=f"K{K}-S{S}-P{P}-H{H}-E{E}",
            runs={
                "skipkernels": run(functional.suffix_attention),
                "eager": run(eager),
                "eager suffixes": run(eager_suffixes),
                COMPILED: run(compiled(reference.suffix_attention)),
            },
            truth=run(reference.suffix_attention, exact, [x.double() for x in upstream]),
            # Of the suffixes: forward reads three and writes one, backward reads four and writes three; the prefix's
            # two are read twice, and their gradients written.
            moved=(11 * K * S + 6 * P) * H * E * dtype.itemsize,
            flops=2 * 7 * K * S * (P + (S + 1) // 2) * H * E,
            target="≥ 3",
        ).with_peers(peers.attentions(device), of_peer)
