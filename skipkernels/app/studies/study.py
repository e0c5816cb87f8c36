"""Results of a comparison of methods as tables, a JSON file and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ...folders import replace_text
from ..data import InputError
from ..report import study_page as page
from ..train.environment import environment
from ..train.run_folder import REPORT
from ..untrusted import read_object
from .runs import MeanAndDeviation, Result, mean_and_deviation

ACCURACY, COST = "accuracy, %", "cost"  # groups of columns
FILE = "compare.json"


@dataclass(frozen=True)
class Column:
    """A column of the tables of a study."""

    group: str  # Name of the group of columns, with the unit if they all share one
    name: str  # Name within the group
    path: tuple[str, ...]  # Keys of the value in the metrics of a run

    def value(self, metrics: Any) -> float | None:
        """Value at `path` in the metrics of a run, or None if a key on it is None."""
        for key in self.path:
            metrics = None if metrics is None else metrics[key]
        return metrics


@dataclass(frozen=True)
class Study:
    """Runs of methods, and the columns that summarize them."""

    title: str
    results: Sequence[Result]
    columns: Sequence[Column]
    comparison: Mapping[str, Any] | None  # of the best method with the others; see `compare_best`
    command: str = ""  # Command that repeats the study

    def summary(self) -> dict[str, dict[str, dict[str, MeanAndDeviation | None]]]:
        """Mean and deviation over seeds, as [method][group][column]."""
        found: dict[str, dict[str, dict[str, MeanAndDeviation | None]]] = {}
        for variant in dict.fromkeys(result.variant for result in self.results):
            metrics = [result.metrics for result in self.results if result.variant == variant]
            groups = found.setdefault(variant, {})
            for column in self.columns:
                groups.setdefault(column.group, {})[column.name] = mean_and_deviation(map(column.value, metrics))
        return found

    def tables(self) -> list[Table]:
        """Tables of the page, for the terminal."""
        return [table.in_terminal(self.title) for table in page.tables(self.as_dict())]

    @property
    def sentences(self) -> list[str]:
        """Meaning of the intervals in the tables, and the result."""
        contents = self.as_dict()
        return [page.explained(contents), page.headline(contents)]

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types: versions, the metrics of every run, and the summary as [mean, deviation]."""
        return {
            "title": self.title,
            "command": self.command,
            "seeds": sorted({result.seed for result in self.results}),
            **environment("cpu"),
            "threads": torch.get_num_threads(),
            "summary": self.summary(),
            "comparison": self.comparison,
            "runs": [result._asdict() for result in self.results],
        }

    def write(self, folder: Path) -> list[Path]:
        """Write compare.json and report.html, and return their paths."""
        contents = json.dumps(self.as_dict(), indent=2) + "\n"
        texts = {folder / FILE: contents, folder / REPORT: page.study_html(json.loads(contents))}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in texts.items():
                replace_text(path, text)
        except OSError as error:
            raise InputError(f"Study.write: {folder} can't be written: {error.strerror}.", "out") from error
        return list(texts)


def study_page(folder: Path) -> str:
    """Return the page of the comparison in a folder, from its JSON file."""
    if not (folder / FILE).is_file():
        raise InputError(f"report: {folder} has no results. Name the folder of a run of tune or compare.", "run")
    try:
        return page.study_html(read_object(folder / FILE))
    # Raised by reading, or by rendering of other contents than expected
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        raise InputError(f"report: {folder}: damaged ({type(error).__name__}: {error}).", "run") from error
