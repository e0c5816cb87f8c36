"""SkipCLIP: Skip Tuning of a CLIP that is already loaded."""

from typing import Any

from .checks import blocks_to_skip, described
from .skip_clip import SkipCLIP
from .step import SkipOutput

__all__ = [
    "SkipCLIP",
    "SkipOutput",
    "blocks_to_skip",
    "check_clip",
]


def check_clip(function: str, clip: Any) -> None:
    """Raise a TypeError unless clip is a SkipCLIP."""
    if not isinstance(clip, SkipCLIP):
        raise TypeError(
            f"{function}: clip must be a SkipCLIP; got {described(clip)}. Wrap the model: "
            "SkipCLIP(model, tokens, skip_layers=…)."
        )
