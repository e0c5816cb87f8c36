"""Tuning a CLIP on a dataset: configuration, training, evaluation, run folder and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import lazy_names

if TYPE_CHECKING:
    from .run_evaluation import evaluate_run
    from .tuning import tune

__all__ = ["evaluate_run", "tune"]

__getattr__ = lazy_names(__name__, {"run_evaluation": ("evaluate_run",), "tuning": ("tune",)})
