"""A tuned model in use: classification of images, blending with the zero-shot model, and export."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_names

if TYPE_CHECKING:
    from .blending import blend
    from .classifier import Classifier
    from .exporting import Exported, export
    from .predictions import Predictions

__all__ = ["Classifier", "Exported", "Predictions", "blend", "export"]

__getattr__ = lazy_names(
    __name__,
    {
        "blending": ("blend",),
        "classifier": ("Classifier",),
        "exporting": ("Exported", "export"),
        "predictions": ("Predictions",),
    },
)
