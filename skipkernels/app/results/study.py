"""Results of a comparison of methods: the contents of compare.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..data import InputError
from ..untrusted import read_object, validated

STUDY = "compare.json"
ACCURACY, COST = "accuracy, %", "cost"
"""Titles of groups of columns."""


class MeanAndDeviation(NamedTuple):
    """Mean and sample standard deviation over runs; the deviation of a single run is None."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> MeanAndDeviation | None:
        """Return mean and deviation, or None if there are no values or one of them is None.

        >>> MeanAndDeviation.of([1.0, 3.0])
        MeanAndDeviation(mean=2.0, deviation=1.4142135623730951)
        >>> MeanAndDeviation.of([1.0, None]) is None
        True
        """
        values = list(values)
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Study:
    """Contents of compare.json."""

    title: str
    command: str
    seeds: list[int]
    finished: str
    versions: dict[str, str]
    machine: str
    threads: int
    summary: dict[str, dict[str, dict[str, MeanAndDeviation | None]]]  # by method, title of a table and column
    comparison: dict[str, Any] | None  # of the best method with the others
    runs: list[dict[str, Any]]  # variant, seed, metrics and folder

    @property
    def images(self) -> dict[str, int]:
        """Number of test images by column of accuracies."""
        return self.runs[0]["metrics"]["images"]["tests"]


def read_study(folder: Path) -> Study:
    """Read the compare.json of a comparison."""
    path = folder / STUDY
    if not path.is_file():
        raise InputError(f"{folder} has no results. Name the folder of a run of tune or compare.", "run", "report")
    try:
        return validated(Study, read_object(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: damaged, or of another version ({error}). Compare again.", "run", "report"
        ) from error
