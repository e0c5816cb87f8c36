"""SkipCLIP: Skip Tuning of a CLIP that is already loaded."""

from .settings import blocks_to_skip
from .skip_clip import SkipCLIP, SkipOutput

__all__ = ["SkipCLIP", "SkipOutput", "blocks_to_skip"]
