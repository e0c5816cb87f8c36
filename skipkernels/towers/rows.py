"""Rows of tokens: the hidden states, attention and options with which a tower calls its blocks.

Rows are the tokens of any number of sequences, packed. Only the attention of a block knows where a sequence ends, and
what a token sees. It takes packed projections: query, key and value of a token side by side, [R, 3W], W = H · E. In the
last block of a tower it returns Q of the R rows:

    class         query_rows               separate_queries   takes             returns
    Sequences     None                     False              [R, 3W]           [R, W]
    SingleQuery   one of each sequence     True               [Q, W], [R, 2W]   [Q, W]
    Suffixes      None, or the last rows   False              [R, 3W]           [R, W] or [Q, W]

The kernel of `Suffixes` reads query, key and value of all rows in one tensor, so that it takes no separate queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..options import FusedMemory

# ---- hidden states and options ---------------------------------------------------------------------------------------


class Hidden(NamedTuple):
    """Hidden states [R, W] as a sum that is not computed yet. (A NamedTuple, in which hooks of FSDP2 find tensors.)

    The reader uses the sum of both terms, so that both have the same gradient up to rounding.
    """

    stream: Tensor
    branch: Tensor | None = None  # in the dtype of products; None in front of the first block

    def sum(self) -> Tensor:
        """Compute the sum in the dtype of the stream."""
        return self.stream if self.branch is None else (self.stream + self.branch).to(self.stream.dtype)


class Rotary(NamedTuple):
    """Rotary position embeddings of the tokens of a sequence, see `functional.rotary_embedding`."""

    cos: Tensor  # [tokens, E/2]; 1 for a token without a position, such as the class token
    sin: Tensor  # [tokens, E/2]
    interleaved: bool


class RowsOptions(NamedTuple):
    """Second argument of a fused block that is called with rows, `block(hidden, options)`; the first is a `Hidden`."""

    attention: BlockAttention
    memory: FusedMemory = "fast"  # What is saved for backward; table in `fused/stages.py`
    rotary: Rotary | None = None  # Of sequences of equal length


# ---- attention -------------------------------------------------------------------------------------------------------


class BlockAttention(Protocol):
    """Attention of a block, scale included, as differentiable code: it knows the sequences and what a token sees."""

    @property
    def query_rows(self) -> Tensor | slice | None:
        """Rows that are returned: int64 [Q] without duplicates, a slice with one of each sequence, or None for all."""

    @property
    def separate_queries(self) -> bool:
        """True if the block projects queries of these rows only, and key and value of all."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map projections [R, 3W], or queries [Q, W] and keys and values [R, 2W], to [R, W] or [Q, W]; `heads=H`."""


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


@dataclass(frozen=True, eq=False)
class Sequences:
    """Attention within n sequences of equal length. PyTorch adds a mask to the logits."""

    n: int
    mask: Tensor | None = None  # [1 or n, 1 or H, tokens, tokens]
    causal: bool = False
    backend: AttentionBackend = SDPA
    query_rows: ClassVar[None] = None
    separate_queries: ClassVar[bool] = False

    def __call__(self, packed: Tensor, *, heads: int) -> Tensor:
        """Map packed projections [R, 3W] to [R, W]."""
        query, key, value = packed.view(self.n, -1, 3, heads, packed.shape[1] // (3 * heads)).unbind(2)
        if self.mask is None and not self.causal:
            return self.backend.full(query, key, value).flatten(2).flatten(0, 1)
        mask = None if self.mask is None else self.mask.to(query.dtype)
        return _sdpa(query, key, value, mask, self.causal).flatten(2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class SingleQuery:
    """Attention of one query per sequence over the keys and values of the sequence.

    The same for every backend: PyTorch computes it with a mask, and `pooled_attention` without.
    """

    query_rows: Tensor | slice  # int64 [n], the pooled tokens among the rows [n · tokens] of the sequences, or a slice
    mask: Tensor | None = None  # [n, tokens], added to their logits
    separate_queries: ClassVar[bool] = True

    @classmethod
    def of_first_tokens(cls, tokens: int) -> SingleQuery:
        """Queries of the first token, such as the class token, of each sequence of this many tokens."""
        return cls(slice(None, None, tokens))

    def __call__(self, query: Tensor, key_value: Tensor, *, heads: int) -> Tensor:
        """Map queries [n, W], and keys and values [R, 2W], to [n, W]."""
        n, width = query.shape
        query = query.view(n, heads, width // heads)
        key, value = key_value.view(n, -1, 2, heads, width // heads).unbind(2)
        if self.mask is None:
            return functional.pooled_attention(query, key, value).flatten(1)
        return _sdpa(query[:, None], key, value, mask=self.mask[:, None, None].to(query.dtype)).flatten(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Suffixes:
    """Causal attention of a shared prefix over itself, and of class suffixes over the prefix and over themselves.

    The rows are those of the prefix, then those of the suffixes, packed by `offsets`, or of `max_length` tokens each.
    """

    backend: AttentionBackend
    prefix_length: int  # P ≥ 1
    offsets: Tensor | None  # int64 [K + 1] into the rows behind the prefix; None if all suffixes have max_length tokens
    max_length: int  # Number of tokens of the longest suffix
    last_rows: Tensor  # int64 [K], the last row of each suffix
    only_last: bool = False  # Only the last rows are returned
    separate_queries: ClassVar[bool] = False

    @property
    def query_rows(self) -> Tensor | None:
        """The rows that are returned; None for all."""
        return self.last_rows if self.only_last else None

    def __call__(self, packed: Tensor, *, heads: int) -> Tensor:
        """Map packed projections [R, 3W] to [R, W], or [K, W] for the last rows."""
        out = self.backend.shared_prefix(
            packed, heads=heads, prefix_length=self.prefix_length, max_length=self.max_length, offsets=self.offsets
        )
        return out.index_select(0, self.last_rows) if self.only_last else out
