"""Where the tokens of prompts lie in rows: what they all begin with, once, then what follows it in each class."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Chosen(NamedTuple):
    """Rows of some classes: the prefix, then their suffixes.

    Attributes:
        picked: int64 [R], which of the rows they are picked from.
        offsets: int64 [K + 1], where each suffix begins behind the prefix; None where all are as long as the longest.
        ends: int64 [K], the rows of the pooled tokens.
    """

    picked: Tensor
    offsets: Tensor | None
    ends: Tensor


class SharedPrefix:
    """Prompts cut into a shared prefix and a suffix for each class, which ends with the pooled token.

    Suffixes are packed. On a GPU those of a step are as long as the longest of all classes instead, since the number of
    tokens in it would have to be waited for. What stands behind a pooled token changes nothing in front of it.

    Args:
        tokens: int64 [C, L].
        pooled: int64 [C], the position of each prompt's pooled token.
        blind: The pooled token sees what is in front of it and not itself.

    Attributes:
        length: P, tokens of the prefix; 0 if the prompts share none. The pooled token is never part of it.
        longest: S, tokens of the longest suffix.
    """

    def __init__(self, tokens: Tensor, pooled: Tensor, *, blind: bool = False):
        same = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()
        self.blind = blind  # it then asks from the row in front, which has to be in the suffix as well
        self.length = max(min(int(same), int(pooled.min()) - blind), 0)
        self._lengths = pooled + 1 - self.length
        self.longest = int(self._lengths.max())
        self._of_one_length = bool((self._lengths == self.longest).all())

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the lengths of the suffixes."""
        self._lengths = fn(self._lengths)

    def _packs(self, device: torch.device) -> bool:
        return device.type == "cpu" and not self._of_one_length

    def _lengths_of(self, class_ids: Tensor | None, device: torch.device) -> Tensor:
        lengths = self._lengths.to(device)
        return lengths if class_ids is None else lengths[class_ids]

    def rows(self, hidden: Tensor, class_ids: Tensor | None = None, *, packed: bool = False) -> Tensor:
        """Hidden states [n, L, W] of the prompts of `class_ids` (None: of all) to rows [R, W].

        With `packed` they lie as among those of all classes.
        """
        prefix, suffixes = hidden[0, : self.length], hidden[:, self.length : self.length + self.longest]
        if packed or class_ids is None or self._packs(hidden.device):
            lengths = self._lengths_of(class_ids, hidden.device)
            suffixes = suffixes[torch.arange(self.longest, device=hidden.device) < lengths[:, None]]
        else:
            suffixes = suffixes.flatten(0, 1)
        return torch.cat([prefix, suffixes])

    @property
    def count(self) -> int:
        """R, rows of all classes."""
        return self.length + int(self._lengths.sum())

    def choose(self, count: int, device: torch.device, class_ids: Tensor | None, of_all: bool) -> Chosen:
        """Where the tokens of `class_ids` are in `count` rows, those of all or, unless `of_all`, of these alone."""
        P, S = self.length, self.longest
        lengths, places = self._lengths_of(class_ids, device), torch.arange(S, device=device)
        ends = lengths.cumsum(0)
        starts = ends - lengths
        if of_all and class_ids is not None:
            every = self._lengths.to(device)
            starts = (every.cumsum(0) - every)[class_ids]
        if self._packs(device):
            index = (P + starts[:, None] + places)[places < lengths[:, None]]
            offsets, at_end = torch.cat([ends.new_zeros(1), ends]), ends - 1
        else:
            grid = S * torch.arange(len(lengths), device=device)
            if not of_all and class_ids is not None:
                starts = grid
            # Behind a suffix comes the next one, and behind the last one its last token again.
            index = (P + starts[:, None] + places).clamp(max=count - 1).flatten()
            offsets, at_end = None, grid + lengths - 1
        return Chosen(torch.cat([torch.arange(P, device=device), index]), offsets, P + at_end)
