"""Predictions as rows of CSV and JSON, and the files of `skipkernels predict`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...folders import replaced_file
from ...formatting import csv_line
from ..data import InputError
from ..results.files import check_writable, writing

if TYPE_CHECKING:
    from torch import Tensor

    from .predictions import Predictions

NONE = "none of these"
"""Label of an image that has none of the classes."""


class Row(NamedTuple):
    """Labels of an image with their probabilities, best first."""

    name: str
    labels: Sequence[tuple[str, float | None]]

    @property
    def known(self) -> bool:
        """False for an image that has none of the classes: its first label is `NONE`, without a probability."""
        return self.labels[0][1] is not None


def rows_of(found: Predictions) -> Iterator[Row]:
    """Yield the rows of predictions; of an image without a class, `NONE` without a probability comes first."""
    for (name, labels), known in zip(found, found.known.tolist(), strict=True):
        yield Row(name, labels if known else [(NONE, None), *labels[:-1]])


def csv_lines(rows: Sequence[Row], *, threshold: bool = False) -> Iterator[str]:
    """Format predictions as CSV: path, label, probability, label_2, probability_2, …; with a threshold also known."""
    columns = ["path", "label", "probability"]
    for place in range(2, len(rows[0].labels) + 1 if rows else 2):
        columns += [f"label_{place}", f"probability_{place}"]
    yield csv_line([*columns, "known"] if threshold else columns)
    for row in rows:
        cells = [row.name]
        for label, probability in row.labels:
            cells += [label, "" if probability is None else f"{probability:.6g}"]
        yield csv_line([*cells, "true" if row.known else "false"] if threshold else cells)


def json_predictions(row: Row) -> list[dict[str, Any]]:
    """Return the labels of an image, with their probabilities, in JSON types."""
    return [{"label": label, "probability": None if p is None else float(f"{p:.6g}")} for label, p in row.labels]


def check_file(path: Path, command: str, argument: str = "out", suffix: str = ".csv") -> None:
    """Check that results can be written to a file, before the work is done."""
    if path.suffix.lower() != suffix:
        raise InputError(f"must end in {suffix}; got {path}.", argument, command)
    parent = path.absolute().parent
    if path.is_dir() or not parent.is_dir():
        raise InputError(f"must be a file in an existing folder; got {path}.", argument, command)
    check_writable(parent, argument, command)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, with the bytes of a file name that is not in UTF-8."""
    with writing(path), replaced_file(path) as new:
        with new.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.writelines(lines)


def write_embeddings(path: Path, parts: Sequence[Tensor]) -> None:
    """Write embeddings of images, batches [B, D] in fp32, as a .npy file [N, D]."""
    rows = np.concatenate(parts) if parts else np.empty((0, 0), np.float32)
    with writing(path, "embeddings"), replaced_file(path) as new, new.open("wb") as file:
        np.save(file, rows)
