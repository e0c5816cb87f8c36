"""How tokens that lie in rows attend to each other: what a block's `attend` is made of.

Rows are [R, W] with W = H · E, heads side by side; they may have gaps between them, as parts of a packed projection do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional

Attention = Literal["sdpa", "xformers"]


class Backend(NamedTuple):
    """Who computes attention.

    Attributes:
        full: (query, key, value), each [n, tokens, H, E] → [n, tokens, H, E], every token to every other.
        causal: The same, each token to itself and those in front of it.
        behind_prefix: `functional.suffix_attention`.
    """

    full: Callable[[Tensor, Tensor, Tensor], Tensor]
    causal: Callable[[Tensor, Tensor, Tensor], Tensor]
    behind_prefix: Callable[..., Tensor]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal).transpose(1, 2)


def _causal_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _sdpa(query, key, value, causal=True)


SDPA = Backend(_sdpa, _causal_sdpa, functional.suffix_attention)


def sequences(
    query: Tensor, key: Tensor, value: Tensor, *, by: Backend, n: int, heads: int, mask: Tensor | None
) -> Tensor:
    """Attention inside each of n sequences of one length; `mask` [1 or n, 1, tokens, tokens] is added to the logits.

    With a mask it is PyTorch's, whoever else is asked.
    """
    query, key, value = (x.view(n, -1, heads, x.shape[1] // heads) for x in (query, key, value))
    if mask is None:
        return by.full(query, key, value).flatten(2).flatten(0, 1)
    return _sdpa(query, key, value, mask=mask.to(query.dtype)).flatten(2).flatten(0, 1)


def pooled(query: Tensor, key: Tensor, value: Tensor, *, heads: int, mask: Tensor | None) -> Tensor:
    """One query for each sequence, [n, W], over its keys; `mask` [n, tokens] is added to the logits."""
    n, width = query.shape
    query = query.view(n, heads, width // heads)
    key, value = (x.view(n, -1, heads, width // heads) for x in (key, value))
    if mask is None:
        return functional.pooled_attention(query, key, value).flatten(1)
    return _sdpa(query[:, None], key, value, mask=mask[:, None, None].to(query.dtype)).flatten(1)


def suffixes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    by: Backend,
    heads: int,
    prefix: int,
    offsets: Tensor | None,
    max_length: int,
    queries: Tensor | None = None,
    blind: Tensor | None = None,
) -> Tensor:
    """Causal attention of class suffixes over the `prefix` rows in front of them all, and over themselves.

    Args:
        query: [R, W], or [Q, W]: of the rows that `queries` names.
        key: [R, W]: the prefix, then the suffixes, packed by `offsets` or all of `max_length` tokens.
        value: [R, W].
        by: Who computes.
        heads: H.
        prefix: P ≥ 1.
        offsets: int64 [K + 1] into the rows behind the prefix, or None.
        max_length: Tokens of the longest suffix.
        queries: int64 [Q], rows whose result is wanted, none of the prefix; all by default.
        blind: int64 [K], rows that see what is in front of them and not themselves, behind another row of their class.
            Where there are queries, it is those.

    Returns:
        [R, W] or [Q, W].
    """
    tokens, width = key.shape
    query, key, value = (x.unflatten(1, (heads, width // heads)) for x in (query, key, value))

    def behind_prefix(query: Tensor) -> Tensor:
        """[R − P, H, E] in every row, to [R − P, W]."""
        packed = [query, key[prefix:], value[prefix:]]
        if offsets is None:
            packed = [x.unflatten(0, (-1, max_length)) for x in packed]
        longest = None if offsets is None else max_length
        queries, keys, values = packed
        out = by.behind_prefix(queries, key[:prefix], value[:prefix], keys, values, offsets=offsets, max_length=longest)
        return out.reshape(tokens - prefix, width)

    def of(query: Tensor, rows: Tensor) -> Tensor:
        """[Q, H, E] of some rows to [Q, W]. Who is blind asks from the row in front."""
        places = rows - prefix if blind is None else rows - prefix - 1
        # The other queries are zeros: attention over a few tokens costs less than the copies of keys for each class.
        query = query.new_zeros(tokens - prefix, *query.shape[1:]).index_copy(0, places, query)
        return behind_prefix(query).index_select(0, places)

    if queries is not None:
        return of(query, queries)
    in_front = by.causal(*(x[None, :prefix] for x in (query, key, value))).reshape(prefix, width)
    out = torch.cat([in_front, behind_prefix(query[prefix:])])
    return out if blind is None else out.index_copy(0, blind, of(query.index_select(0, blind), blind))
