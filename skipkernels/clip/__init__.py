"""SkipCLIP: Skip Tuning of a CLIP that is already loaded."""

from .base import SkipOutput, blocks_to_skip
from .skip_clip import SkipCLIP, check_clip

__all__ = [
    "SkipCLIP",
    "SkipOutput",
    "blocks_to_skip",
    "check_clip",
]
