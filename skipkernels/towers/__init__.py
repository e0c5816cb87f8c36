"""Image and text towers of a CLIP model, cut below block `skip`; one file per model family in `families/`."""

from .base import Cut, ImageTower, Memory, Reduction, UnsupportedModel
from .modes import deterministic_training, evaluating
from .registry import build_towers
from .text import TextTower

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
