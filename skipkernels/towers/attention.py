"""Attention over rows of tokens [R, W]: full sequences, one pooled query per sequence, or suffixes behind a prefix.

W = H · E. Rows may be strided: query, key and value are views of one packed projection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional


class AttentionBackend(NamedTuple):
    """Functions that compute attention.

    Attributes:
        full: (query, key, value), each [n, tokens, H, E] → [n, tokens, H, E], without a mask.
        causal: The same, with a causal mask.
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


SDPA = AttentionBackend(_sdpa, _causal_sdpa, functional.suffix_attention)


def sequences(
    query: Tensor, key: Tensor, value: Tensor, *, backend: AttentionBackend, n: int, heads: int, mask: Tensor | None
) -> Tensor:
    """Attention within each of n sequences of equal length; `mask` [1 or n, 1, tokens, tokens] is added to the logits.

    With a mask, PyTorch's attention is used instead of the backend.
    """
    query, key, value = (x.view(n, -1, heads, x.shape[1] // heads) for x in (query, key, value))
    if mask is None:
        return backend.full(query, key, value).flatten(2).flatten(0, 1)
    return _sdpa(query, key, value, mask=mask.to(query.dtype)).flatten(2).flatten(0, 1)


def pooled(query: Tensor, key: Tensor, value: Tensor, *, heads: int, mask: Tensor | None) -> Tensor:
    """One query per sequence, [n, W], over its keys; `mask` [n, tokens] is added to the logits."""
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
    backend: AttentionBackend,
    heads: int,
    prefix_length: int,
    offsets: Tensor | None,
    max_length: int,
    query_rows: Tensor | None = None,
    excludes_self: Tensor | None = None,
) -> Tensor:
    """Causal attention of class suffixes over the shared prefix in front of them, and over themselves.

    Args:
        query: [R, W], or [Q, W] with `query_rows`.
        key: [R, W], the prefix, then the suffixes, packed by `offsets` or padded to `max_length` tokens.
        value: [R, W].
        backend: Attention functions.
        heads: H.
        prefix_length: P ≥ 1.
        offsets: int64 [K + 1] into the rows behind the prefix, or None.
        max_length: Number of tokens of the longest suffix.
        query_rows: int64 [Q], rows to compute, all behind the prefix; default: all rows.
        excludes_self: int64 [K], rows that attend to the rows in front of them and not to themselves; none is the
            first of its suffix. Must equal `query_rows`, if given.

    Returns:
        [R, W] or [Q, W].
    """
    tokens, width = key.shape
    query, key, value = (x.unflatten(1, (heads, width // heads)) for x in (query, key, value))

    def behind_prefix(query: Tensor) -> Tensor:
        """[R − P, H, E] to [R − P, W]."""
        packed = [query, key[prefix_length:], value[prefix_length:]]
        if offsets is None:
            packed = [x.unflatten(0, (-1, max_length)) for x in packed]
        out = backend.behind_prefix(
            packed[0], key[:prefix_length], value[:prefix_length], *packed[1:],
            offsets=offsets, max_length=None if offsets is None else max_length,
        )  # fmt: skip
        return out.reshape(tokens - prefix_length, width)

    def some_rows(query: Tensor, rows: Tensor) -> Tensor:
        """[Q, H, E] to [Q, W]. The query of a row that excludes itself is computed at the row in front of it."""
        positions = rows - prefix_length if excludes_self is None else rows - prefix_length - 1
        # The other queries are zeros: attention over a few tokens costs less than copies of the keys per class.
        query = query.new_zeros(tokens - prefix_length, *query.shape[1:]).index_copy(0, positions, query)
        return behind_prefix(query).index_select(0, positions)

    if query_rows is not None:
        return some_rows(query, query_rows)
    prefix = backend.causal(*(x[None, :prefix_length] for x in (query, key, value))).reshape(prefix_length, width)
    out = torch.cat([prefix, behind_prefix(query[prefix_length:])])
    if excludes_self is None:
        return out
    return out.index_copy(0, excludes_self, some_rows(query.index_select(0, excludes_self), excludes_self))
