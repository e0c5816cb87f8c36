"""Prompts packed into rows: the layout of all prompts of a task, and of those of the classes that are selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import in_same_dtype
from ..ops.packed_layout import packed_layout


class Pooling(NamedTuple):
    """Pooled tokens of prompts, and why a reduction is not exact for them; None where it is."""

    positions: Tensor  # int64 [C], of the pooled tokens
    why_not_shared: str | None = None  # why a prefix cannot be shared, such as a token that sees later ones
    why_not_cropped: str | None = None
    visible_length: int | None = None  # number of tokens that a pooled token can see; default: up to the last one


class Prompts:
    """One prompt of each class, and the layout of their hidden states as rows [R, W].

    With a shared prefix, the rows are those of the P = `prefix_length` tokens of the prefix, then those of each suffix
    up to its pooled token. Without a shared prefix, P = 0, and a suffix is the whole prompt.

    Attributes:
        tokens: int64 [C, L], cropped to the tokens that a pooled token can see.
        pooled: int64 [C], positions of the pooled tokens.
        given_length: Number of tokens of the prompts before they were cropped.
        prompt_length: Number of tokens of a whole prompt, L, or L + 1 with CoCa's class token, which has no token id.
        prefix_length: P.
        suffix_lengths: int64 [C], rows of each suffix.
        starts: int64 [C], the first of them.
        max_suffix_length: S, the largest of the lengths.
        has_equal_suffixes: True if all lengths are S: the rows of K classes are then counted without the device.
        row_count: R.
        most_rows: Upper bounds of the rows of any K different classes, by K: those of the K longest suffixes.
        why_not_cropped, why_not_shared: Why a reduction is not exact for the prompts; None where it is.
    """

    def __init__(self, tokens: Tensor, pooling: Pooling):
        pooled, needed_length = pooling.positions, int(pooling.positions.max()) + 1
        self.pooled = pooled
        self.given_length = tokens.shape[1]
        # 1. Tokens that a pooled token can see
        self.why_not_cropped = pooling.why_not_cropped
        if self.why_not_cropped is None:
            tokens = tokens[:, : pooling.visible_length or needed_length].contiguous()
        self.tokens = tokens
        self.prompt_length = max(tokens.shape[1], needed_length)
        # 2. The prefix
        P = 0 if pooling.why_not_shared else _shared_prefix_length(tokens, pooled)
        self.prefix_length = P
        self.why_not_shared = pooling.why_not_shared
        if P == 0 and self.why_not_shared is None:
            first = int(pooled.min()) == 0
            self.why_not_shared = "a pooled token is the first" if first else "the prompts begin with different tokens"
        # 3. Rows of the prefix and of the suffixes
        lengths = pooled + 1 - P if P else torch.full_like(pooled, self.prompt_length)  # [C]
        self.suffix_lengths = lengths
        self.starts = P + lengths.cumsum(0) - lengths  # [C]
        self.row_count = P + int(lengths.sum())
        self.max_suffix_length = int(lengths.max())
        self.has_equal_suffixes = bool((lengths == self.max_suffix_length).all())
        self.most_rows = [P, *(P + lengths.sort(descending=True)[0].cumsum(0)).tolist()]

    def select(self, class_ids: Tensor) -> SelectedPrompts:
        """Return the layout of the prompts of K different classes, `class_ids` [K]."""
        return SelectedPrompts(self, class_ids)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: getattr(self, name) for name in ("tokens", "pooled", "suffix_lengths", "starts")}

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, such as a move to a device, to every tensor."""
        for name, value in self.tensors().items():
            setattr(self, name, in_same_dtype(fn, value))


def _shared_prefix_length(tokens: Tensor, pooled: Tensor) -> int:
    """Length of the prefix that all prompts [C, L] share, in front of every pooled token."""
    same = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()  # [C, L] -> [L] -> []
    return min(int(same), int(pooled.min()))


class SelectedPrompts:
    """Layout of the prompts of K different classes: the shared prefix, then their suffixes, one after the other.

        a photo of a | cat . end | hot dog . end | …      "|" begins a suffix; `end` is pooled

    Rows may follow the last suffix: on a GPU the number of rows is one that suffices for any K classes, since counting
    the rows of these K would need a host sync. The additional rows repeat other rows; attention neither reads them nor
    gives them a gradient.

    Attributes:
        row_count: R.
        row_numbers: int64 [R], indices of these rows among the rows of all classes.
        offsets: int64 [K + 1], start of each suffix, counted behind the prefix; None if all have the same length.
        last_rows: int64 [K], row of the last token of each class; with a shared prefix that is the pooled one.
    """

    def __init__(self, prompts: Prompts, class_ids: Tensor):
        self.prompts, self.class_ids = prompts, class_ids
        P, K, lengths = prompts.prefix_length, len(class_ids), prompts.suffix_lengths
        if prompts.has_equal_suffixes:
            self.row_count = P + K * prompts.max_suffix_length
        elif counts_are_known(class_ids.device):
            self.row_count = P + int(lengths[class_ids].sum())
        else:
            self.row_count = prompts.most_rows[K]
        self.row_numbers, offsets, self.last_rows = packed_layout(class_ids, prompts.starts, lengths, P, self.row_count)
        self.offsets = None if prompts.has_equal_suffixes else offsets

    @property
    def tokens(self) -> Tensor:
        """Tokens [K, L] of these prompts."""
        return self.prompts.tokens[self.class_ids]

    @property
    def pooled(self) -> Tensor:
        """Positions [K] of their pooled tokens."""
        return self.prompts.pooled[self.class_ids]

    def pack(self, hidden: Tensor) -> Tensor:
        """Pack hidden states [K, L, W] of these prompts into rows."""
        P, (K, L, _) = self.prompts.prefix_length, hidden.shape
        hidden = hidden.flatten(0, 1)  # [K · L, W]
        if not P:
            return hidden
        # `row_numbers` are of packed rows; here suffix k begins at row P + k · L of whole prompts.
        class_numbers = torch.arange(K, device=hidden.device)
        lengths = self.prompts.suffix_lengths[self.class_ids]  # [K]
        row_numbers, *_ = packed_layout(class_numbers, P + L * class_numbers, lengths, P, self.row_count)
        return hidden.index_select(0, row_numbers)  # [R, W]

    def unpack(self, rows: Tensor) -> Tensor:
        """Unpack rows [R, W] into whole prompts [K, L, W].

        Behind the pooled token the last row of the suffix is repeated; no token before attends to it.
        """
        P, (K, W) = self.prompts.prefix_length, (len(self.class_ids), rows.shape[1])
        if not P:
            return rows.view(K, -1, W)
        positions = torch.arange(self.prompts.prompt_length - P, device=rows.device)  # in the suffix
        first_rows = self.last_rows - self.prompts.suffix_lengths[self.class_ids] + 1  # [K]
        index = torch.minimum(first_rows[:, None] + positions, self.last_rows[:, None])  # [K, L - P]
        # The backward of `expand` adds the gradients of the prefix in a fixed order.
        prefix = rows[:P].expand(K, P, W)  # [K, P, W]
        return torch.cat([prefix, rows.index_select(0, index.flatten()).view(K, -1, W)], dim=1)  # [K, L, W]


def counts_are_known(device: torch.device) -> bool:
    """Return True if the number of rows can be read on the host; on a GPU that would be a host sync."""
    return device.type == "cpu"
