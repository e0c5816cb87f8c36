"""`suffix_attention` at the sizes of the text tower: suffixes of five tokens behind "a photo of a", from 26 to 1,380.

"eager" is what a model does whose mask is causal: every prompt whole, so that the prefix's rows are computed for each
class. "eager suffixes" has only the suffixes' queries, with an explicit mask; the prefix's keys are still expanded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from . import Case, with_gradients


def eager(query: Tensor, prefix_key: Tensor, prefix_value: Tensor, suffix_key: Tensor, suffix_value: Tensor) -> Tensor:
    P = prefix_key.shape[0]
    # What queries the prefix has does not matter: its rows are dropped, as is their gradient.
    whole = _behind(prefix_key.detach(), query)
    key, value = _behind(prefix_key, suffix_key), _behind(prefix_value, suffix_value)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (whole, key, value)), is_causal=True)
    return out.transpose(1, 2)[:, P:]


def eager_suffixes(
    query: Tensor, prefix_key: Tensor, prefix_value: Tensor, suffix_key: Tensor, suffix_value: Tensor
) -> Tensor:
    S, P = query.shape[1], prefix_key.shape[0]
    key, value = _behind(prefix_key, suffix_key), _behind(prefix_value, suffix_value)
    visible = torch.ones(S, P + S, dtype=torch.bool).tril(P)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=visible)
    return out.transpose(1, 2)


def _behind(prefix: Tensor, suffix: Tensor) -> Tensor:
    return torch.cat([prefix.expand(suffix.shape[0], *prefix.shape), suffix], dim=1)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    S, P, H, E = 5, 6, 8, 64
    for K in (26, 77, 500, 1380):
        # As a tower has them: parts of one projection, of the prefix and of the suffixes.
        prefix = torch.randn(P, 3, H, E, generator=rng).to(dtype)
        suffix = torch.randn(K, S, 3, H, E, generator=rng).to(dtype)
        query, suffix_key, suffix_value = suffix.unbind(2)
        parts = (query, prefix[:, 1], prefix[:, 2], suffix_key, suffix_value)
        inputs = [x.detach().requires_grad_() for x in parts]
        upstream = [torch.randn(K, S, H, E, generator=rng).to(dtype)]
        exact = [x.detach().double().requires_grad_() for x in parts]

        def run(function, inputs=inputs, upstream=upstream):
            return with_gradients(lambda: [function(*inputs)], inputs, upstream)

        yield Case(
            shape=f"K{K}-S{S}-P{P}-H{H}-E{E}",
            runs={
                "skipkernels": run(functional.suffix_attention),
                "eager": run(eager),
                "eager suffixes": run(eager_suffixes),
            },
            truth=run(reference.suffix_attention, exact, [x.double() for x in upstream]),
            # Of the suffixes: forward reads three and writes one, backward reads four and writes three; the prefix's
            # two are read twice, and their gradients written.
            moved=(11 * K * S + 6 * P) * H * E * dtype.itemsize,
            flops=2 * 7 * K * S * (P + (S + 1) // 2) * H * E,
            absent={"xformers": "its memory_efficient_attention has no CPU kernel"},
            target="≥ 3",
        )
