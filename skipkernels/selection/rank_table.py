"""Kept ranks of many steps, drawn ahead on a device, so that a step there does not wait for the host."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .probabilities import systematic_sample

_TABLE_STEPS = 1024  # steps drawn ahead on a GPU
_TABLE_RANKS = 1 << 20  # in at most 8 MiB


class Intervals(NamedTuple):
    """Intervals of the sampled ranks.

    Attributes:
        certain: int64 [m], the ranks before them.
        ends: fp64 [C − m], ends of the intervals.
        total: Sum of the lengths; a whole number if all draws have the same size.
    """

    certain: Tensor
    ends: Tensor
    total: float

    @property
    def most(self) -> int:
        """Largest number of ranks of a draw."""
        return math.ceil(self.total)

    def count(self, start: float) -> int:
        """Number of points start, start + 1, … below the total."""
        # Bounded: total − start may be rounded to a whole number.
        return max(math.floor(self.total), min(math.ceil(self.total - start), self.most))

    def draw(self, starts: Tensor) -> Tensor:
        """Draw positions in the tail, [..., most], for uniform numbers [...]; the first count(start) are the draw."""
        return systematic_sample(self.ends, starts[..., None] + torch.arange(self.most, device=starts.device))


class RankTable:
    """Kept ranks of the coming steps, on a device.

    Attributes:
        rows: int64 [steps, largest K]; one row if every step keeps the same ranks.
        row: int64 [largest K], the ranks of the reserved step, at an address that a captured graph can read.
        starts: The uniform number that each row is drawn with.
        next: Index of the next row.
    """

    def __init__(self, device: torch.device, certain: Tensor, intervals: Intervals | None):
        self._certain, self._intervals = certain, intervals
        kept = len(certain) + (0 if intervals is None else intervals.most)
        steps = 1 if intervals is None else max(1, min(_TABLE_STEPS, _TABLE_RANKS // kept))
        self.rows = torch.empty(steps, kept, dtype=torch.int64, device=device)
        self.row = torch.empty(kept, dtype=torch.int64, device=device)
        self.starts: list[float] = []
        self.next = 0
        if intervals is None:
            self._upload(certain[None])

    def fits(self, device: torch.device, certain: Tensor, intervals: Intervals | None) -> bool:
        """Return True if the rows are drawn from these ranks, for this device."""
        if self.rows.device != device:
            return False
        mine = self._intervals
        if mine is not None and mine is intervals:
            return True
        same = mine is intervals or (mine is not None and intervals is not None and mine.ends.equal(intervals.ends))
        return same and self._certain.equal(certain)

    def fill(self, start: Tensor, generator: torch.Generator) -> None:
        """Draw every row: the first with `start`, the others with the next numbers of the generator, which stays."""
        assert self._intervals is not None
        ahead = torch.Generator().set_state(generator.get_state())
        rest = torch.rand(len(self.rows) - 1, generator=ahead, dtype=torch.float64)  # [steps − 1]
        starts = torch.cat([start[None], rest])  # [steps]
        certain = self._certain.expand(len(starts), -1)  # [steps, m]
        # [steps, largest K]
        self._upload(torch.cat([certain, len(self._certain) + self._intervals.draw(starts)], dim=1))
        self.starts, self.next = starts.tolist(), 0

    def _upload(self, ranks: Tensor) -> None:
        self.rows.copy_(ranks.pin_memory() if self.rows.device.type == "cuda" else ranks, non_blocking=True)

    def current(self) -> Tensor:
        """Return the ranks [K] of the last step that was reserved, a view."""
        if self._intervals is None:
            return self.rows[0]
        return self.rows[self.next - 1, : len(self._certain) + self._intervals.count(self.starts[self.next - 1])]
