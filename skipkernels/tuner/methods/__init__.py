"""Methods of the tuner: Skip Tuning and the zero-shot model. `experiments.baselines` adds the others."""

from .base import Method, Recipe, StepOutput
from .skip import Skip
from .zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {method.name: method for method in (Skip, ZeroShot)}

__all__ = ["METHODS", "Method", "Recipe", "Skip", "StepOutput", "ZeroShot"]
