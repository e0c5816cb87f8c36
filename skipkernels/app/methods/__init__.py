"""Methods of the application, one per module: Skip Tuning, zero-shot classification and the baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_names
from .registry import METHODS

if TYPE_CHECKING:
    from .base import Method, StepOutput
    from .recipe import Recipe, TrainingData

__all__ = ["METHODS", "Method", "Recipe", "StepOutput", "TrainingData"]

__getattr__ = lazy_names(__name__, {"base": ("Method", "StepOutput"), "recipe": ("Recipe", "TrainingData")})
