"""Prompts as rows: the prefix that all prompts share, once, then the suffix of each class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def shared_prefix_length(tokens: Tensor, pooled: Tensor, *, excludes_self: bool = False) -> int:
    """Length of the prefix that all prompts [C, L] share, in front of every pooled token [C].

    If the pooled token excludes itself, its query is computed at the row in front of it, which then belongs to the
    suffix.
    """
    same = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()
    return max(min(int(same), int(pooled.min()) - excludes_self), 0)


class PackedPrompts:
    """Prompts of all classes, and the layout of their hidden states as rows [R, W].

    With a shared prefix, rows are the prefix, then the suffixes, each up to its pooled token. Without one (P = 0) each
    class has the rows of its whole prompt.

    Args:
        tokens: int64 [C, L].
        pooled: int64 [C], the position of the token of each prompt that becomes its embedding.
        prefix_length: P, number of tokens of the shared prefix, at most `shared_prefix_length`.
        excludes_self: The pooled token attends to the tokens in front of it and not to itself.

    Attributes:
        starts: int64 [C], first row of each suffix.
        lengths: int64 [C], number of rows of each suffix.
        max_length: S, the largest of them.
        row_count: R.
    """

    def __init__(self, tokens: Tensor, pooled: Tensor, prefix_length: int, *, excludes_self: bool = False):
        self.tokens, self.pooled = tokens, pooled
        self.prefix_length, self.excludes_self = prefix_length, excludes_self
        length = max(tokens.shape[1], int(pooled.max()) + 1)  # CoCa embeds one token more than there are token ids
        self.lengths = pooled + 1 - prefix_length if prefix_length else torch.full_like(pooled, length)
        self.starts = prefix_length + self.lengths.cumsum(0) - self.lengths
        self.max_length, self.row_count = int(self.lengths.max()), prefix_length + int(self.lengths.sum())
        self._same_length = bool((self.lengths == self.max_length).all())

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, such as a move to a device, to every tensor."""
        self.tokens, self.pooled = fn(self.tokens), fn(self.pooled)
        self.lengths, self.starts = fn(self.lengths), fn(self.starts)

    def _packs(self, device: torch.device) -> bool:
        """Return True if the suffixes of a step are packed on this device.

        On a GPU they are padded to the longest of all classes: the number of packed rows would need a host sync.
        """
        return device.type == "cpu" and not self._same_length

    def pack(self, hidden: Tensor, class_ids: Tensor | None = None) -> Tensor:
        """Pack hidden states [K, L, W] of `class_ids` (default: all classes) into rows."""
        return _pack(hidden, self, self.lengths if class_ids is None else self.lengths[class_ids])

    def select(self, class_ids: Tensor) -> SelectedPrompts:
        """Return the layout of the prompts of `class_ids` [K] in a step."""
        return SelectedPrompts(self, class_ids)


class SelectedPrompts:
    """Layout of the prompts of K classes in a step: the shared prefix, then their suffixes, packed or padded.

    Attributes:
        class_ids: int64 [K].
        offsets: int64 [K + 1], start of each packed suffix, counted behind the prefix; None if each is padded to S
            rows. A pooled token does not see the padding behind it.
        ends: int64 [K], rows of the pooled tokens.
    """

    def __init__(self, prompts: PackedPrompts, class_ids: Tensor):
        self._prompts, self.class_ids = prompts, class_ids
        self._lengths = self.offsets = None
        if prompts._packs(class_ids.device):
            self._lengths = prompts.lengths[class_ids]
            ends = self._lengths.cumsum(0)
            self.offsets, self.ends = torch.cat([ends.new_zeros(1), ends]), prompts.prefix_length - 1 + ends
        else:
            first_rows = prompts.max_length * torch.arange(len(class_ids), device=class_ids.device)
            self.ends = first_rows + prompts.pooled[class_ids]

    def row_numbers(self) -> Tensor:
        """Indices of these rows among the rows of all classes, int64 [R]."""
        device, positions = self.class_ids.device, torch.arange(self._prompts.max_length, device=self.class_ids.device)
        rows = self._prompts.starts[self.class_ids][:, None] + positions
        if self._lengths is not None:
            rows = rows[positions < self._lengths[:, None]]
        else:  # padding is the next suffix; for the last suffix, its last row again
            rows = rows.clamp(max=self._prompts.row_count - 1).flatten()
        return torch.cat([torch.arange(self._prompts.prefix_length, device=device), rows])

    def pack(self, hidden: Tensor) -> Tensor:
        """Pack hidden states [K, L, W] of these prompts into rows."""
        return _pack(hidden, self._prompts, self._lengths)


def _pack(hidden: Tensor, prompts: PackedPrompts, lengths: Tensor | None) -> Tensor:
    """Pack hidden states [K, L, W] into rows. Suffixes have `lengths` [K] or, if None, are padded to the longest."""
    if not prompts.prefix_length:
        return hidden.flatten(0, 1)
    prefix, suffixes = hidden[0, : prompts.prefix_length], hidden[:, prompts.prefix_length :][:, : prompts.max_length]
    if lengths is None:
        return torch.cat([prefix, suffixes.flatten(0, 1)])
    return torch.cat([prefix, suffixes[torch.arange(prompts.max_length, device=hidden.device) < lengths[:, None]]])
