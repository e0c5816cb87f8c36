"""Names of the files of a run, reading of those with its results, and errors for those that can't be written."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import CONFIG
from ..data import InputError
from ..data.files import expanded
from ..untrusted import OPEN_CLIP, read_object

METRICS, EPOCHS, REPORT, CARD = "metrics.json", "metrics.jsonl", "report.html", "README.md"
PREDICTIONS, PREDICTIONS_CSV = "predictions.safetensors", "predictions.csv"
CANDIDATES = "candidates.json"
CLASSIFIER, MODEL, HEAD = "classifier.json", "model.safetensors", "head.safetensors"
RUN_FILES = (
    *(METRICS, REPORT, PREDICTIONS, PREDICTIONS_CSV, CARD, CLASSIFIER, MODEL, HEAD),
    *(OPEN_CLIP, EPOCHS, CANDIDATES, CONFIG),
)
"""All files of a run; the last one marks the others as those of a run."""


def existing_run(folder: str | Path, function: str, argument: str = "run") -> Path:
    """Return the folder of a run, or of an export that can be loaded."""
    path = expanded(folder)
    if not path.is_dir():
        wrong = "is not a folder"
    elif not any((path / name).is_file() for name in (CONFIG, CLASSIFIER)):
        wrong = f"has neither {CONFIG} nor {CLASSIFIER}"
    else:
        return path
    raise InputError(f"must be the folder of a run; {path} {wrong}.", argument, function)


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the metrics.json of a complete run."""
    try:
        return read_object(folder / METRICS)
    except FileNotFoundError:
        raise InputError(
            f"{folder / METRICS}: no such file. A run has it when it is complete; continue one that was stopped with "
            "`resume=RUN`."
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{folder / METRICS}: damaged ({reason}). Restore it from a copy, or tune again in another folder."
        ) from error


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """Read the metrics.jsonl of a run; empty if it has none, as a blend."""
    path = folder / EPOCHS
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}).") from error


def check_writable(folder: Path, argument: str = "out", function: str = "tune") -> None:
    """Check that a folder can be created and written."""
    if os.path.exists(folder) and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder.", argument, function)
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".skipkernels-", dir=existing):  # os.access is wrong about /proc
            pass
    except OSError as error:
        raise InputError(
            f"{folder} can't be created: {existing} is not a writable folder; choose another.",
            argument,
            function,
        ) from error


@contextlib.contextmanager
def writing(path: Path, argument: str = "out", function: str = "tune") -> Iterator[None]:
    """Convert an OSError to the error for a file or a folder that can't be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} can't be written: {error.strerror or error}.", argument, function) from error
