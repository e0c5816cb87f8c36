"""compare.json: the metrics of the runs of a comparison and their means; and the page that is made of it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...folders import replace_text
from ..data import InputError
from ..report.study_page import MeanAndDeviation, Study, study_html
from ..results.files import REPORT, writing
from ..train.metrics import environment
from ..untrusted import read_object, validated
from .runs import Result

FILE = "compare.json"
Columns = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Keys of a value in the metrics of a run, by the title of a table and the name of a column."""


def mean_and_deviation(values: Iterable[float | None]) -> MeanAndDeviation | None:
    """Return mean and deviation, or None if there are no values or one of them is None.

    >>> mean_and_deviation([1.0, 3.0])
    MeanAndDeviation(mean=2.0, deviation=1.4142135623730951)
    >>> mean_and_deviation([1.0, None]) is None
    True
    """
    values = list(values)
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return MeanAndDeviation(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def study_of(
    title: str, command: str, results: Sequence[Result], columns: Columns, comparison: dict[str, Any] | None
) -> Study:
    """Return the contents of compare.json; `comparison` is that of the best method with the others."""

    def summary(variant: str, keys: tuple[str, ...]) -> MeanAndDeviation | None:
        return mean_and_deviation(_value(result.metrics, keys) for result in results if result.variant == variant)

    summaries = {
        variant: {
            table: {name: summary(variant, keys) for name, keys in of_table.items()}
            for table, of_table in columns.items()
        }
        for variant in dict.fromkeys(result.variant for result in results)
    }
    return Study(
        title=title,
        command=command,
        seeds=sorted({result.seed for result in results}),
        **environment("cpu"),
        threads=torch.get_num_threads(),
        summary=summaries,
        comparison=comparison,
        runs=[result._asdict() for result in results],
    )


def _value(metrics: Any, keys: tuple[str, ...]) -> float | None:
    """Value of the metrics of a run; None if one on the way to it is None."""
    for key in keys:
        metrics = None if metrics is None else metrics[key]
    return metrics


def write_study(study: Study, folder: Path) -> list[Path]:
    """Write compare.json and report.html, and return their paths."""
    texts = {folder / FILE: json.dumps(dataclasses.asdict(study), indent=2) + "\n", folder / REPORT: study_html(study)}
    with writing(folder, "out", "compare"):
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            replace_text(path, text)
    return list(texts)


def study_page(folder: Path) -> str:
    """Return the page of the comparison in a folder, from its compare.json."""
    if not (folder / FILE).is_file():
        raise InputError(f"{folder} has no results. Name the folder of a run of tune or compare.", "run", "report")
    try:
        study = validated(Study, read_object(folder / FILE))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder / FILE}: damaged, or of another version ({error}). Compare again.", "run", "report"
        ) from error
    return study_html(study)
