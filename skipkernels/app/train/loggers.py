"""Loggers of the scalars of a run: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...options import LoggerName
from ..report.plots import finite
from .errors import argument_error

_PROJECT = "skipkernels"  # of Weights & Biases


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


def chosen(log: Sequence[LoggerName] | None) -> list[str]:
    """Return the names of the packages in the setting `log`; None: TensorBoard if it is installed."""
    if log is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") is not None else []
    names: list[str] = [name for name in dict.fromkeys(log) if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise argument_error("log", f"{name} is not installed: pip install {name}.")
    return names


def open_loggers(log: Sequence[LoggerName] | None, settings: dict[str, Any], folder: Path) -> Iterator[Logger]:
    """Open the loggers of the setting `log`, one by one; `settings` are those of the run."""
    for name in chosen(log):
        yield TensorBoardLogger(folder) if name == "tensorboard" else WandbLogger(settings, folder)


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


class WandbLogger:
    """Logger for Weights & Biases, in the project "skipkernels". A resumed run is another one there."""

    def __init__(self, settings: dict[str, Any], folder: Path):
        import wandb

        self._run = wandb.init(project=_PROJECT, name=folder.name, dir=str(folder), config=settings)

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the scalars of an epoch."""
        self._run.log(scalars(row), step=row["epoch"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
