"""SkipCLIP: Skip Tuning of a CLIP that is already loaded."""

from .base import blocks_to_skip
from .graphed import GraphedStep
from .output import SkipOutput
from .skip_clip import SkipCLIP, check_clip

__all__ = [
    "GraphedStep",
    "SkipCLIP",
    "SkipOutput",
    "blocks_to_skip",
    "check_clip",
]
