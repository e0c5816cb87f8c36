"""Methods of the tuner: Skip Tuning and zero-shot classification. `skipkernels.experiments` registers the baselines."""

from ..registry import METHODS
from .base import Method, Recipe, StepOutput
from .skip import Skip
from .zero_shot import ZeroShot

__all__ = ["METHODS", "Method", "Recipe", "Skip", "StepOutput", "ZeroShot"]
