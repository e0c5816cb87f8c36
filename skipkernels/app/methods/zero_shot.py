"""Zero-shot classification by the pretrained model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...options import Protocol
from .base import Recipe
from .frozen import FrozenModel


class ZeroShot(FrozenModel):
    """Zero-shot classification (Radford et al. 2021). Nothing is trained, and nothing in the model is changed.

        z_bc = exp(logit_scale) · ⟨x̂_b, t̂_c⟩,   t̂_c the unit-norm mean of the class's prompts

    Source: Radford et al., CLIP, ICML 2021, arXiv 2103.00020.
    """

    name = "zero-shot"

    @classmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        return Recipe(epochs=0)

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        """Do nothing."""

    def parameter_groups(self, *, text_lr: float, image_lr: float) -> list[dict[str, Any]]:
        """Return no groups."""
        return []

    def _tensors(self) -> dict[str, Tensor]:
        return {}
