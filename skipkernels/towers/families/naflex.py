"""timm's `NaFlexVit` as the image tower of an open_clip model, on images of one size: an ordinary vision transformer.

Positions are interpolated to the size of the images; there is no padding, and so no mask.
"""

from __future__ import annotations

from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from ..base import ImageTower, Part, UnsupportedModel
from .timm import TransformerTower, timm_tower


class NaFlexTower(TransformerTower):
    """Image tower with a `NaFlexVit` as its trunk."""

    def __init__(self, model: Any):
        self.model, self.visual = model, model.visual
        self.trunk = trunk = model.visual.trunk
        if trunk.rope is not None:
            raise UnsupportedModel(
                "SkipCLIP: the NaFlexVit of the image tower has rotary positions; learned positions are handled."
            )
        self.blocks = trunk.blocks
        self.image_size = tuple(model.visual.image_size)

    @property
    def embedding(self) -> tuple[Part, ...]:
        return self.trunk.embeds, self.trunk.patch_drop, self.trunk.norm_pre

    def embed(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.trunk.embeds(inputs)
        if self.trunk.patch_drop is not None:
            hidden, _ = self.trunk.patch_drop(hidden)
        return self.trunk.norm_pre(hidden)


def image_tower(model: Any) -> ImageTower:
    """Build the image tower with a `TimmModel` as `visual`."""
    return (NaFlexTower if type(model.visual.trunk) is NaFlexVit else timm_tower)(model)
