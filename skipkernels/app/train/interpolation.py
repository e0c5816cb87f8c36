"""Weights between those before and after training (WiSE-FT)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Interpolation:
    """Weights θ = (1 − alpha) · θ_before + alpha · θ_after, set in the tensors of `state`.

    θ_before are their values at construction, and θ_after those when `end` is called.

    Example:
        >>> weight = torch.zeros(1)
        >>> between = Interpolation({"weight": weight})
        >>> _ = weight.fill_(4.0)
        >>> between.end()
        >>> between.set(0.25), weight.item()
        (None, 1.0)
    """

    def __init__(self, state: Mapping[str, Tensor]):
        self._state = {name: tensor.detach() for name, tensor in state.items()}
        self._before = {name: tensor.clone() for name, tensor in self._state.items()}
        self._ends: dict[str, tuple[Tensor, Tensor]] = {}

    def end(self) -> None:
        """Take the values that the tensors have now as those after training."""
        self._ends = {
            name: (before, self._state[name].clone())
            for name, before in self._before.items()
            if not torch.equal(before, self._state[name])
        }

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Set the weights; alpha 0 are exactly those before training, and 1 those after it."""
        for name, (before, after) in self._ends.items():
            self._state[name].copy_(_between(before, after, alpha))


def _between(before: Tensor, after: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1) or not before.is_floating_point():
        return after if alpha == 1 else before
    wide = torch.promote_types(before.dtype, torch.float32)
    return torch.lerp(before.to(wide), after.to(wide), alpha)
