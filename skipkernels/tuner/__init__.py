"""Tuning a CLIP on a dataset: configuration, step, loop, evaluation, what is written, and the report."""

from .config import TuneConfig
from .evaluation import epochs_left, evaluate_run
from .run import check, tune

__all__ = ["TuneConfig", "check", "epochs_left", "evaluate_run", "tune"]
