"""Probabilities of CSkip: which ranks a step keeps, and how a sample of the tail is drawn from them.

Classes are ranked by their score for the batch. The first m are always kept. Rank m + j of the tail is kept with
probability q_j, which falls exponentially from 1 to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_TAIL_SPAN = 5.0  # the published code spaces the tail evenly over [0, 5] and takes exp(−x / decay)


def base_keep(num_classes: int, keep_ratio: float, max_keep: int) -> int:
    """Return m, the number of top-ranked classes that are always kept.

    m = min(⌈keep_ratio · C⌉, max_keep) for a ratio below 1, every class for 1, min(keep_ratio, C, max_keep) above.

    >>> base_keep(37, 0.5, 50), base_keep(1000, 0.5, 50), base_keep(1000, 1.0, 50), base_keep(1000, 20, 50)
    (19, 50, 1000, 20)
    """
    if keep_ratio == 1.0:
        return num_classes
    # Rounded first: 0.07 · 100 is 7.000000000000001, and ⌈·⌉ of that is 8.
    wanted = keep_ratio * num_classes if keep_ratio < 1.0 else min(keep_ratio, num_classes)
    return min(math.ceil(round(wanted, 9)), max_keep, num_classes)


@dataclass(frozen=True)
class RankLaw:
    """Law of the kept ranks of a step: those below `keep`, and rank keep + j of the tail with probability q[j]."""

    num_classes: int
    keep: int
    decay: float
    max_tail: int | None

    @cached_property
    def q(self) -> Tensor:
        """Probabilities [C − keep] in fp64."""
        return bounded(tail_probabilities(self.num_classes - self.keep, self.decay), self.max_tail)

    @cached_property
    def intervals(self) -> Intervals:
        """Intervals of q: a draw has ⌊Σq⌋ or ⌈Σq⌉ ranks of the tail."""
        ends = self.q.cumsum(0)
        return Intervals(ends, round(ends[-1].item(), 9) if len(ends) else 0.0)

    @cached_property
    def intervals_of_one_size(self) -> Intervals:
        """Intervals of `inclusion_probabilities`: every draw has round(Σq) ranks of the tail."""
        return Intervals(inclusion_probabilities(self.q).cumsum(0), round(self.q.sum().item()))


class Intervals(NamedTuple):
    """Intervals of [0, Σπ), one for each rank of the tail, of which each draw takes those that contain its points."""

    ends: Tensor  # [tail] in fp64, Σ_{i≤j} π_i, with every π at most 1
    total: float  # Σπ; without rounding errors, by which a whole number would have draws of two sizes

    def draw(self, start: float) -> Tensor:
        """Places in the tail [n] int64, n = ⌊Σπ⌋ or ⌈Σπ⌉, by a number in [0, 1)."""
        # The number of points start, start + 1, … below the total; bounded, since total − start may be rounded down.
        count = max(math.floor(self.total), math.ceil(self.total - start))
        return systematic_sample(self.ends, start + torch.arange(count, dtype=torch.float64, device="cpu"))


def tail_probabilities(tail: int, decay: float) -> Tensor:
    """q [tail] in fp64: probability to keep each rank of the tail.

    q_j = (e_j − e_last) / (e_0 − e_last), with e_j = exp(−x_j / decay) and x evenly spaced over [0, 5]. For
    tail = 1, q = 1.

    >>> [round(q, 6) for q in tail_probabilities(3, decay=0.3).tolist()]
    [1.0, 0.00024, 0.0]
    """
    if tail == 1:
        return torch.ones(1, dtype=torch.float64, device="cpu")
    x = torch.linspace(0.0, _TAIL_SPAN, tail, dtype=torch.float64, device="cpu")  # [tail]
    # The same quotient by expm1: the difference of the exponentials loses all digits for a large decay.
    return torch.exp(-x / decay) * (torch.expm1((x - _TAIL_SPAN) / decay) / math.expm1(-_TAIL_SPAN / decay)).abs()


def bounded(q: Tensor, max_tail: int | None) -> Tensor:
    """q [tail], scaled so that Σq ≤ max_tail; unchanged for None or a smaller sum.

        q_j · min(1, max_tail / Σq)

    Not part of the published method: the probabilities keep their ratios and no longer begin at 1.

    >>> bounded(torch.tensor([1.0, 0.75, 0.25], dtype=torch.float64), max_tail=1)
    tensor([0.5000, 0.3750, 0.1250], dtype=torch.float64)
    """
    total = q.sum().item()
    return q if max_tail is None or total <= max_tail else q * (max_tail / total)


def inclusion_probabilities(q: Tensor) -> Tensor:
    """π [tail] in fp64: q scaled so that its sum is an integer, with no entry above 1.

    π_j = min(1, a · q_j) with a such that Σπ = round(Σq), so that Σ|π − q| ≤ 1/2, and all draws have the same size.

    >>> inclusion_probabilities(torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64))
    tensor([1.0000, 0.7143, 0.2857], dtype=torch.float64)
    """
    count = round(q.sum().item())
    certain = 0  # q is descending, so the entries that reach 1 come first
    while certain < count:
        scale = (count - certain) / q[certain:].sum().item()
        if scale * q[certain] <= 1:
            return torch.cat([q.new_ones(certain), scale * q[certain:]])  # [tail]
        certain += 1
    return torch.cat([q.new_ones(certain), q.new_zeros(len(q) - certain)])  # [tail]


def systematic_sample(ends: Tensor, points: Tensor) -> Tensor:
    """Positions [n] int64, ascending and distinct: index of the interval that contains each point.

    Interval j is [Σ_{i<j} π_i, Σ_{i≤j} π_i). With points u, u + 1, … below Σ π, u uniform in [0, 1), position j is
    drawn with probability π_j. Source: Madow, "On the Theory of Systematic Sampling, II", Annals of Mathematical
    Statistics 20, 1949.

    Args:
        ends: [tail] fp64, Σ_{i≤j} π_i, with every π at most 1.
        points: [n] fp64.

    >>> systematic_sample(torch.tensor([1.0, 1.5, 1.75, 2.0]).double(), 0.6 + torch.arange(2).double())
    tensor([0, 2])
    """
    # By rounding the last end may be below the last point.
    return torch.searchsorted(ends, points, right=True).clamp_(max=len(ends) - 1)
