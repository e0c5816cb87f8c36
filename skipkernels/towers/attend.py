"""How tokens that lie in rows attend to each other: what a block's `attend` is made of.

Rows are [R, W] with W = H · E, heads side by side; they may have gaps between them, as parts of a packed projection do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional


def sequences(query: Tensor, key: Tensor, value: Tensor, *, n: int, heads: int, mask: Tensor | None) -> Tensor:
    """Full attention inside each of n sequences of one length; `mask` [tokens, tokens] is added to the logits."""
    query, key, value = (x.view(n, -1, heads, x.shape[1] // heads).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2).flatten(0, 1)


def pooled(query: Tensor, key: Tensor, value: Tensor, *, heads: int, mask: Tensor | None) -> Tensor:
    """One query for each sequence, [n, W], over its keys; `mask` [n, tokens] is added to the logits."""
    n, width = query.shape
    query = query.view(n, heads, width // heads)
    key, value = (x.view(n, -1, heads, width // heads) for x in (key, value))
    if mask is None:
        return functional.pooled_attention(query, key, value).flatten(1)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(query[:, :, None], key, value, attn_mask=mask[:, None, None])
    return mixed.flatten(1)


def suffixes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    prefix: int,
    offsets: Tensor | None,
    max_length: int,
    queries: Tensor | None = None,
) -> Tensor:
    """Causal attention of class suffixes over the `prefix` rows in front of them all, and over themselves.

    Args:
        query: [R, W], or [Q, W]: of the rows that `queries` names.
        key: [R, W]: the prefix, then the suffixes, packed by `offsets` or all of `max_length` tokens.
        value: [R, W].
        heads: H.
        prefix: P ≥ 1.
        offsets: int64 [K + 1] into the rows behind the prefix, or None.
        max_length: Tokens of the longest suffix.
        queries: int64 [Q], rows whose result is wanted, none of the prefix; all by default.

    Returns:
        [R, W] or [Q, W].
    """
    tokens, width = key.shape
    if queries is not None:
        # The other queries are zeros: attention over a few tokens costs less than the copies of keys for each class.
        query = query.new_zeros(tokens, width).index_copy(0, queries, query)
    query, key, value = (x.unflatten(1, (heads, width // heads)) for x in (query, key, value))
    packed = [x[prefix:] for x in (query, key, value)]
    if offsets is None:
        packed = [x.unflatten(0, (-1, max_length)) for x in packed]
    out = functional.suffix_attention(
        packed[0],
        key[:prefix],
        value[:prefix],
        packed[1],
        packed[2],
        offsets=offsets,
        max_length=None if offsets is None else max_length,
    ).reshape(tokens - prefix, width)
    if queries is not None:
        return out.index_select(0, queries - prefix)
    q, k, v = (x[None, :prefix].transpose(1, 2) for x in (query, key, value))
    in_front = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(prefix, width)
    return torch.cat([in_front, out])
