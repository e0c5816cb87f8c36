"""Tuning a CLIP on a dataset: configuration, step, loop, evaluation, what is written, and the report."""

from .config import TuneConfig
from .evaluation import Accuracy, evaluate_run
from .loop import tune

__all__ = ["Accuracy", "TuneConfig", "evaluate_run", "tune"]
