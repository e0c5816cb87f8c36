"""Scalars of a run for TensorBoard, if it is installed."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .plots import finite

_SWITCH = "tensorboard.compat.notf"  # TensorBoard does not import TensorFlow if this module exists


class EventWriter:
    """Writer of the scalars of each epoch.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`.
    """

    def __init__(self, writer: Any):
        self._writer = writer

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl, and flush, so that a kill loses no complete epoch."""
        scalars = {"loss": row.get("loss"), "kept_classes": row.get("kept_classes"), "seconds": row.get("seconds")}
        scalars["validation"] = row.get("validation")
        for group, values in (("lr", "lr"), ("accuracy", "accuracy"), ("seconds", "stage_seconds")):
            scalars |= {f"{group}/{name}": value for name, value in (row.get(values) or {}).items()}
        for tag, value in scalars.items():
            if finite(value):
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def open_tensorboard(folder: Path) -> EventWriter | None:
    """Return a writer of events in a folder; None if TensorBoard is not installed.

    TensorFlow is not imported even if installed: it takes seconds, and most of the memory of a GPU.
    """
    try:
        with _without_tensorflow():
            from torch.utils.tensorboard import SummaryWriter

            return EventWriter(SummaryWriter(log_dir=str(folder)))
    except ImportError:
        return None
    except (TypeError, AttributeError, ValueError) as error:  # incompatible versions
        warnings.warn(
            f"TensorBoard is installed, but fails here ({type(error).__name__}: {error}); no events are written.",
            stacklevel=2,
        )
        return None


@contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Let TensorBoard use its own stub of TensorFlow, unless TensorFlow is already imported."""
    if "tensorflow" in sys.modules or _SWITCH in sys.modules:
        yield
        return
    sys.modules[_SWITCH] = types.ModuleType(_SWITCH)
    try:
        yield
    finally:
        del sys.modules[_SWITCH]
