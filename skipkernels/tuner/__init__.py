"""Tuning a CLIP on a dataset: configuration, training, evaluation, run folder and report.

Importing this package imports nothing else: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TuneConfig
    from .evaluation import epochs_left, evaluate_run
    from .run import check, tune

__all__ = ["TuneConfig", "check", "epochs_left", "evaluate_run", "tune"]

_HOME = {
    "TuneConfig": "config",
    "check": "run",
    "epochs_left": "evaluation",
    "evaluate_run": "evaluation",
    "tune": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
