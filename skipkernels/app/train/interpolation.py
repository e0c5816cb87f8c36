"""Means of the weights of a model before and after training, by which runs are blended."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...dtypes import wide_dtype


class Interpolation:
    """Weights set in place to θ = (1 − alpha) · θ_before + alpha · θ_after.

    θ_before are their values at construction, and θ_after those when `end` is called.

    Example:
        >>> weight = torch.zeros(1)
        >>> between = Interpolation([weight])
        >>> _ = weight.fill_(4.0)
        >>> between.end()
        >>> between.set(0.25), weight.item()
        (None, 1.0)
    """

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = [(weight.detach(), weight.detach().clone()) for weight in weights]  # now, and before training
        self._ends: list[tuple[Tensor, Tensor, Tensor]] | None = None  # weights that changed, with both values

    def end(self) -> None:
        """Take the values that the weights have now as those after training."""
        self._ends = [
            (weight, before, weight.clone()) for weight, before in self._weights if not torch.equal(weight, before)
        ]

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Set the weights; alpha 0 are exactly those before training, and 1 those after it."""
        assert self._ends is not None, "`end` has not been called"
        for weight, before, after in self._ends:
            weight.copy_(_between(before, after, alpha))


def _between(before: Tensor, after: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1) or not before.is_floating_point():
        return after if alpha == 1 else before
    wide = wide_dtype(before.dtype)
    return torch.lerp(before.to(wide), after.to(wide), alpha)
