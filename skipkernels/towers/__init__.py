"""The two towers of a CLIP, cut at the LSkip boundary: one file per family of models, and how to find it."""

from __future__ import annotations

from torch import Tensor, nn

from .base import ImageTower, Memory, TextTower, UnsupportedModel
from .open_clip import OpenClipImageTower, OpenClipTextTower

__all__ = ["ImageTower", "Memory", "TextTower", "UnsupportedModel", "build_towers"]


def build_towers(model: nn.Module, tokens: Tensor) -> tuple[ImageTower, TextTower]:
    """The image and text tower of a model, nothing skipped yet.

    Args:
        model: An open_clip `CLIP` or `CustomTextCLIP`.
        tokens: [C, L] int64, the tokenised prompt of each class.

    Raises:
        UnsupportedModel: If no adapter handles the model, with the reason.
    """
    return OpenClipImageTower(model), OpenClipTextTower(model, tokens)
