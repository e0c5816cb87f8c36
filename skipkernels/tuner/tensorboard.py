"""The numbers of a run for TensorBoard, where it is installed."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .plots import finite

_SWITCH = "tensorboard.compat.notf"  # TensorBoard's own: where there is such a module, it leaves TensorFlow alone


class Board:
    """Scalars of each epoch, by `torch.utils.tensorboard.SummaryWriter`.

    Args:
        writer: The SummaryWriter.
    """

    def __init__(self, writer: Any):
        self._writer = writer

    def row(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl; at once, so that a killed run has all its epochs."""
        scalars = {"loss": row.get("loss"), "kept_classes": row.get("kept_classes"), "seconds": row.get("seconds")}
        for group, values in (("lr", "lr"), ("accuracy", "accuracy"), ("seconds", "budget")):
            scalars |= {f"{group}/{name}": value for name, value in (row.get(values) or {}).items()}
        for tag, value in scalars.items():
            if finite(value):
                self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def open_board(folder: Path) -> Board | None:
    """A board whose events are in a folder; None where TensorBoard is not installed.

    TensorFlow is not imported, even where it is installed: it would take seconds, and most of the memory of a GPU.
    """
    try:
        with _without_tensorflow():
            from torch.utils.tensorboard import SummaryWriter

            return Board(SummaryWriter(log_dir=str(folder)))
    except ImportError:
        return None
    except (TypeError, AttributeError, ValueError) as error:  # of versions that don't go together
        warnings.warn(
            f"TensorBoard is installed, but fails here ({type(error).__name__}: {error}); no events are written.",
            stacklevel=2,
        )
        return None


@contextmanager
def _without_tensorflow() -> Iterator[None]:
    """TensorBoard writes with its own stand-in for TensorFlow, unless the process has TensorFlow already."""
    if "tensorflow" in sys.modules or _SWITCH in sys.modules:
        yield
        return
    sys.modules[_SWITCH] = types.ModuleType(_SWITCH)
    try:
        yield
    finally:
        del sys.modules[_SWITCH]
