"""Methods of the application, one per module: Skip Tuning, zero-shot classification and the baselines."""

from .base import Method, Recipe, StepOutput
from .registry import METHODS

__all__ = ["METHODS", "Method", "Recipe", "StepOutput"]
