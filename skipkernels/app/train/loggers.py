"""Loggers of the scalars of a run: TensorBoard, a CSV file, Weights & Biases and MLflow."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...folders import replace_text
from ...formatting import csv_line
from ..report.plots import finite
from .errors import argument_error

if TYPE_CHECKING:
    from ..config import TuneConfig

CSV = "metrics.csv"
_SWITCH = "tensorboard.compat.notf"  # TensorBoard does not import TensorFlow if this module exists
_PROJECT = "skipkernels"  # of Weights & Biases


class Logger(Protocol):
    """Logger of a run, such as one that is passed to `tune`."""

    def write(self, row: Mapping[str, Any], /) -> None:
        """Write the row of an epoch: that of metrics.jsonl. `scalars` flattens it."""

    def close(self) -> None:
        """End, also after an error."""


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row of metrics.jsonl by name.

    >>> scalars({"epoch": 1, "loss": 0.5, "accuracy": {"base": 60.0, "new": None}, "stage_seconds": {"step": 2.0}})
    {'loss': 0.5, 'accuracy/base': 60.0, 'seconds/step': 2.0}
    """
    found = {name: row.get(name) for name in ("loss", "kept_classes", "seconds", "validation")}
    for group, values in (("lr", "lr"), ("accuracy", "accuracy"), ("seconds", "stage_seconds")):
        found |= {f"{group}/{name}": value for name, value in (row.get(values) or {}).items()}
    return {name: value for name, value in found.items() if finite(value)}


def chosen(log: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names in the setting `log`, which may be separated by commas; None for the default.

    Raises:
        InputError: If there is no logger of a name, or its package is not installed.

    Example:
        >>> chosen(("csv,none",)), chosen(("none",)), chosen(None)
        (('csv',), (), None)
    """
    if log is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for part in log for name in part.split(",") if name.strip()))
    unknown = [name for name in names if name not in (*_LOGGERS, "none")]
    if unknown:
        raise argument_error("log", f"no logger {unknown[0]!r}; choose of {', '.join(_LOGGERS)}, or none.")
    for name in names:
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise argument_error("log", f"{name} is not installed: pip install {name}.")
    return tuple(name for name in names if name != "none")


def open_loggers(config: TuneConfig, folder: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[Logger]:
    """Open the loggers that a run names, one by one; by default TensorBoard if it is installed."""
    names = chosen(config.log)
    for name in ("tensorboard",) if names is None else names:
        logger = _LOGGERS[name](config, folder, rows)
        if logger is not None:
            yield logger


class CsvLogger:
    """Writer of metrics.csv, with a column for each scalar, from the rows of a resumed run on."""

    def __init__(self, path: Path, rows: Sequence[Mapping[str, Any]] = ()):
        self._path, self._rows = path, list(rows)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write all rows."""
        self._rows.append(row)
        lines = [{"epoch": row["epoch"]} | scalars(row) for row in self._rows]
        names = list(dict.fromkeys(name for line in lines for name in line))
        rows = ([line.get(name, "") for name in names] for line in lines)
        replace_text(self._path, "".join(map(csv_line, [names, *rows])))

    def close(self) -> None:
        """Do nothing: the file is complete."""


class WandbLogger:
    """Logger for Weights & Biases, in the project "skipkernels". A resumed run is another one there."""

    def __init__(self, config: TuneConfig, folder: Path):
        import wandb

        self._run = wandb.init(project=_PROJECT, name=folder.name, dir=str(folder), config=config.identity())

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the scalars of an epoch."""
        self._run.log(scalars(row), step=row["epoch"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowLogger:
    """Logger for MLflow, at the tracking server that its environment variables name. A resumed run is another one."""

    def __init__(self, config: TuneConfig, folder: Path):
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=folder.name)
        mlflow.log_params(config.identity())

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the scalars of an epoch."""
        named = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in scalars(row).items()}
        self._mlflow.log_metrics(named, step=row["epoch"])

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class EventWriter:
    """Writer of the scalars of each epoch for TensorBoard, by a `torch.utils.tensorboard.SummaryWriter`."""

    def __init__(self, writer: Any):
        self._writer = writer

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row of metrics.jsonl, and flush, so that a kill loses no complete epoch."""
        for tag, value in scalars(row).items():
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


_LOGGERS: dict[str, Callable[[TuneConfig, Path, Sequence[Mapping[str, Any]]], Logger | None]] = {
    "tensorboard": lambda config, folder, rows: open_tensorboard(folder),
    "csv": lambda config, folder, rows: CsvLogger(folder / CSV, rows),
    "wandb": lambda config, folder, rows: WandbLogger(config, folder),
    "mlflow": lambda config, folder, rows: MlflowLogger(config, folder),
}
_PACKAGES = ("tensorboard", "wandb", "mlflow")
