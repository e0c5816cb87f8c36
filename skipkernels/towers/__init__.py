"""Image and text towers of a CLIP model, cut below block `skip`; one file per model family in `families/`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names
from .base import Cut, ImageTower, Memory, Reduction, UnsupportedModel
from .modes import deterministic_training, evaluating
from .text import TextTower

if TYPE_CHECKING:
    from .registry import build_towers

__all__ = [
    "Cut",
    "ImageTower",
    "Memory",
    "Reduction",
    "TextTower",
    "UnsupportedModel",
    "build_towers",
    "deterministic_training",
    "evaluating",
]

__getattr__ = lazy_names(__name__, {"registry": ("build_towers",)})
