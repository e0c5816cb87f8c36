"""Attention over rows of tokens: full sequences, one pooled query per sequence, or suffixes behind a prefix.

Rows are packed projections: query, key and value of a token side by side, [R, 3W], W = H · E.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional


class AttentionBackend(NamedTuple):
    """Functions that compute attention."""

    # (query, key, value), each [n, tokens, H, E] → [n, tokens, H, E], without a mask
    full: Callable[[Tensor, Tensor, Tensor], Tensor]
    shared_prefix: Callable[..., Tensor]  # `functional.shared_prefix_attention`


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2)


SDPA = AttentionBackend(_sdpa, functional.shared_prefix_attention)


def sequences(
    packed: Tensor, *, backend: AttentionBackend, n: int, heads: int, mask: Tensor | None, causal: bool = False
) -> Tensor:
    """Attention within n sequences of equal length. A mask is as in `BlockInput`; PyTorch adds it."""
    query, key, value = packed.view(n, -1, 3, heads, packed.shape[1] // (3 * heads)).unbind(2)
    if mask is None and not causal:
        return backend.full(query, key, value).flatten(2).flatten(0, 1)
    mask = None if mask is None else mask.to(query.dtype)
    return _sdpa(query, key, value, mask, causal).flatten(2).flatten(0, 1)


def pooled(query: Tensor, key_value: Tensor, *, heads: int, mask: Tensor | None) -> Tensor:
    """One query per sequence, [n, W], over its keys and values [R, 2W]; `mask` [n, tokens] is added to the logits."""
    n, width = query.shape
    query = query.view(n, heads, width // heads)
    key, value = key_value.view(n, -1, 2, heads, width // heads).unbind(2)
    if mask is None:
        return functional.pooled_attention(query, key, value).flatten(1)
    return _sdpa(query[:, None], key, value, mask=mask[:, None, None].to(query.dtype)).flatten(1)


def suffixes(
    packed: Tensor,
    *,
    backend: AttentionBackend,
    heads: int,
    prefix_length: int,
    offsets: Tensor | None,
    max_length: int,
    query_rows: Tensor | None = None,
    rows_without_self: Tensor | None = None,
) -> Tensor:
    """Causal attention of a shared prefix over itself, and of class suffixes over the prefix and over themselves.

    Args:
        packed: [R, 3W], the prefix, then the suffixes, packed by `offsets` or padded to `max_length` tokens.
        backend: Attention functions.
        heads: H.
        prefix_length: P ≥ 1.
        offsets: int64 [K + 1] into the rows behind the prefix, or None.
        max_length: Number of tokens of the longest suffix.
        query_rows: int64 [Q], rows to return, all behind the prefix; default: all rows.
        rows_without_self: int64 [K], rows that attend to the rows in front of them and not to themselves; none is the
            first of its suffix. Must equal `query_rows`, if given.

    Returns:
        [R, W] or [Q, W].
    """

    def attend(packed: Tensor) -> Tensor:
        return backend.shared_prefix(
            packed, heads=heads, prefix_length=prefix_length, max_length=max_length, offsets=offsets
        )

    def without_self(rows: Tensor) -> Tensor:
        """Attention [K, W] of rows over those in front of them: the query is computed at the row in front of it."""
        width = packed.shape[1] // 3
        query, key_value = packed.split([width, 2 * width], dim=1)  # [R, W], [R, 2W]
        # The query of row r takes the place of that of row r − 1, which attends to itself and not to row r.
        shifted = query.index_copy(0, rows - 1, query.index_select(0, rows))  # [R, W]
        return attend(torch.cat([shifted, key_value], dim=1)).index_select(0, rows - 1)

    if query_rows is not None:
        return attend(packed).index_select(0, query_rows) if rows_without_self is None else without_self(query_rows)
    out = attend(packed)
    return out if rows_without_self is None else out.index_copy(0, rows_without_self, without_self(rows_without_self))
