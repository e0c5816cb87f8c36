"""Tuning a CLIP on a dataset: configuration, step, loop, evaluation, what is written, and the report."""

from .config import TuneConfig
from .evaluation import evaluate_run
from .loop import tune

__all__ = ["TuneConfig", "evaluate_run", "tune"]
