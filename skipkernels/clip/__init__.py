"""SkipCLIP: Skip Tuning of a CLIP that is already loaded."""

from .cut import blocks_to_skip
from .skip_clip import SkipCLIP, check_clip
from .step import SkipOutput

__all__ = [
    "SkipCLIP",
    "SkipOutput",
    "blocks_to_skip",
    "check_clip",
]
