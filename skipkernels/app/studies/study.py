"""Results of a study as tables, a JSON file and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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

Layout = Literal["variants", "tests", "shots", "folds"]

_MOST_ROWS = 60  # of a table in the terminal


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
    """Runs and the columns that summarize them."""

    name: str  # Name of the output files without extension
    title: str
    results: Sequence[Result]
    columns: Sequence[Column]
    # Rows of the tables: compared variants, tests of a protocol, numbers of shots, or folds
    layout: Layout = "variants"
    command: str = ""  # Command that repeats the study
    more: Mapping[str, Any] = field(default_factory=dict)  # Further contents of the JSON file

    @property
    def variants(self) -> list[str]:
        """Names of the variants, in the order of their runs."""
        return list(dict.fromkeys(result.variant for result in self.results))

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs, sorted."""
        return sorted({result.seed for result in self.results})

    def summary(self) -> dict[str, dict[str, dict[str, MeanAndDeviation | None]]]:
        """Mean and deviation over seeds, as [variant][group][column]."""
        found: dict[str, dict[str, dict[str, MeanAndDeviation | None]]] = {variant: {} for variant in self.variants}
        for column in self.columns:
            for variant, groups in found.items():
                values = [column.value(result.metrics) for result in self.results if result.variant == variant]
                groups.setdefault(column.group, {})[column.name] = mean_and_deviation(values)
        return found

    def tables(self) -> list[Table]:
        """Tables of the page, for the terminal: without long ones."""
        tables = page.tables(self.as_dict())
        return [table.in_terminal(self.title) for table in tables if len(table.rows) <= _MOST_ROWS]

    @property
    def sentences(self) -> list[str]:
        """Meaning of the intervals in the tables, and the result."""
        contents = self.as_dict()
        return [page.explained(contents), page.headline(contents)]

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON types: versions, the metrics of every run, and the summary as [mean, deviation]."""
        return {
            "study": self.name,
            "title": self.title,
            "layout": self.layout,
            "command": self.command,
            "seeds": self.seeds,
            **environment("cpu"),
            "threads": torch.get_num_threads(),
            "summary": self.summary(),
            **self.more,
            "runs": [result._asdict() for result in self.results],
        }

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.json and report.html, and return their paths."""
        contents = json.dumps(self.as_dict(), indent=2) + "\n"
        texts = {folder / f"{self.name}.json": contents, folder / REPORT: page.study_html(json.loads(contents))}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in texts.items():
                replace_text(path, text)
        except OSError as error:
            raise InputError(f"Study.write: {folder} can't be written: {error.strerror}.", "out") from error
        return list(texts)


def study_page(folder: Path) -> str:
    """Return the page of the study in a folder, from its JSON file."""
    try:
        for path in sorted(folder.glob("*.json")):
            found = read_object(path)
            if found.get("study") == path.stem and "summary" in found:
                return page.study_html(found)
    # Raised by reading, or by rendering of other contents than expected
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, StopIteration) as error:
        raise InputError(f"report: {folder}: damaged ({type(error).__name__}: {error}).", "run") from error
    raise InputError(f"report: {folder} has no results. Name the folder of a run of tune, compare or protocol.", "run")
