"""Predictions as rows of CSV and JSON, and the files of `skipkernels predict`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...folders import replaced_file
from ...formatting import csv_line
from ..data import InputError
from ..results.files import check_writable

if TYPE_CHECKING:
    from torch import Tensor

    from .classifier import Predictions

NONE = "none of these"
"""Label of an image that has none of the classes."""

Row = tuple[str, Sequence[tuple[str, float | None]]]
"""Name of an image, and its labels with their probabilities, best first."""


def check_file(path: Path, command: str, argument: str = "out", suffix: str = ".csv") -> None:
    """Check that results can be written to a file, before the work is done."""
    if path.suffix.lower() != suffix:
        raise InputError(f"must end in {suffix}; got {path}.", argument, command)
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir():
        raise InputError(f"must be a file in an existing folder; got {path}.", argument, command)
    check_writable(parent, argument, command)


def rows_of(found: Predictions) -> Iterator[Row]:
    """Yield the rows of predictions; of an image without a class, `NONE` without a probability comes first."""
    for (name, labels), known in zip(found, found.known.tolist(), strict=True):
        yield name, labels if known else [(NONE, None), *labels[:-1]]


def csv_lines(rows: Iterable[Row], *, threshold: bool = False) -> Iterator[str]:
    """Format predictions as CSV: path, label, probability, label_2, probability_2, …; with a threshold also known."""
    rows = list(rows)
    numbers = ["", *(f"_{n + 2}" for n in range(len(rows[0][1]) - 1 if rows else 0))]
    columns = ["path", *(f"{name}{number}" for number in numbers for name in ("label", "probability"))]
    yield csv_line([*columns, "known"] if threshold else columns)
    for name, found in rows:
        cells = [name, *(cell for label, p in found for cell in (label, "" if p is None else f"{p:.6g}"))]
        yield csv_line([*cells, json.dumps(found[0][1] is not None)] if threshold else cells)


def json_predictions(found: Sequence[tuple[str, float | None]]) -> list[dict[str, Any]]:
    """Return the labels of a row, with their probabilities, in JSON types."""
    return [{"label": label, "probability": None if p is None else float(f"{p:.6g}")} for label, p in found]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, with the bytes of a file name that is not in UTF-8."""
    with replaced_file(path) as new, new.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.writelines(lines)


def write_embeddings(path: Path, parts: Sequence[Tensor]) -> None:
    """Write embeddings of images, batches [B, D] in fp32, as a .npy file [N, D]."""
    rows = np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
    with replaced_file(path) as new, new.open("wb") as file:
        np.save(file, rows)
