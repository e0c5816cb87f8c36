"""Loggers of the rows of a run, which a caller passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..report.formats import finite


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
    numbers = {name: row.get(name) for name in ("loss", "kept_classes", "seconds", "validation")}
    for group in ("lr", "accuracy"):
        numbers |= {f"{group}/{name}": value for name, value in (row.get(group) or {}).items()}
    return {name: value for name, value in numbers.items() if finite(value)}
