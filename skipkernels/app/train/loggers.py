"""Loggers of the scalars of a run: TensorBoard, and those of a caller."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...options import LoggerName
from ..report.plots import finite
from .errors import argument_error


class Logger(Protocol):
    """Logger of a run, such as one that is passed to `tune`."""

    def write(self, row: Mapping[str, Any], /) -> None:
        """Write the row of an epoch: that of metrics.jsonl. `scalars` flattens it."""

    def close(self) -> None:
        """End, also after an error."""


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row of metrics.jsonl by name.

    >>> scalars({"epoch": 1, "loss": 0.5, "accuracy": {"base": 60.0, "new": None}})
    {'loss': 0.5, 'accuracy/base': 60.0}
    """
    found = {name: row.get(name) for name in ("loss", "kept_classes", "seconds", "validation")}
    for group in ("lr", "accuracy"):
        found |= {f"{group}/{name}": value for name, value in (row.get(group) or {}).items()}
    return {name: value for name, value in found.items() if finite(value)}


def writes_events(log: LoggerName | None) -> bool:
    """Return True if a run with the setting `log` writes events of TensorBoard; None: if it is installed."""
    installed = importlib.util.find_spec("tensorboard") is not None
    if log == "tensorboard" and not installed:
        raise argument_error("log", "tensorboard is not installed: pip install tensorboard.")
    return installed and log != "none"


class TensorBoardLogger:
    """Writer of TensorBoard events into a run folder."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the scalars of an epoch, and flush, so that a kill loses no complete epoch."""
        for tag, value in scalars(row).items():
            self._writer.add_scalar(tag, value, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
