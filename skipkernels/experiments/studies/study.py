"""What a study writes: one JSON, one table, one picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from ...data import InputError
from ...store import replace_text
from .runs import Result, Spread, by_variant

ACCURACY, COST = "accuracy, %", "cost"  # groups of columns

Layout = Literal["variants", "tests", "shots"]

Value = Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Column:
    """A figure of every variant.

    Attributes:
        group: The columns that it stands with, and their unit.
        name: Its own, different from the others of the group.
        value: Of a run's metrics; None where it has none.
        digits: Behind the point.
    """

    group: str
    name: str
    value: Value
    digits: int = 1


@dataclass(frozen=True)
class Study:
    """Runs, and what of them is shown.

    Attributes:
        name: Of its files.
        title: Of its table and picture.
        results: All runs.
        columns: Of its tables.
        layout: What its table and picture go along: variants that are compared, the tests of a protocol, or shots.
    """

    name: str
    title: str
    results: Sequence[Result]
    columns: Sequence[Column]
    layout: Layout = "variants"

    @property
    def variants(self) -> list[str]:
        """In the order in which they were run."""
        return list(dict.fromkeys(result.variant for result in self.results))

    @property
    def seeds(self) -> list[int]:
        """Of the runs."""
        return sorted({result.seed for result in self.results})

    def summary(self) -> dict[str, dict[str, dict[str, Spread | None]]]:
        """Of each variant, group and column: mean and deviation over the seeds."""
        found: dict[str, dict[str, dict[str, Spread | None]]] = {variant: {} for variant in self.variants}
        for column in self.columns:
            for variant, figure in by_variant(self.results, column.value).items():
                found[variant].setdefault(column.group, {})[column.name] = figure
        return found

    def tables(self) -> list[Table]:
        """For the terminal: along tests a single table with a column for each group, else a table for each."""
        summary, groups = self.summary(), list(dict.fromkeys(column.group for column in self.columns))
        title = f"{self.title}, {len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        digits = {(column.group, column.name): column.digits for column in self.columns}

        def cell(variant: str, group: str, name: str) -> str:
            figure = summary[variant][group].get(name)
            return "–" if figure is None else figure.text(digits[group, name])

        if self.layout == "tests":
            (variant,) = summary
            rows = dict.fromkeys(column.name for column in self.columns)
            return [
                _table(title, variant, groups, {row: [cell(variant, group, row) for group in groups] for row in rows})
            ]
        return [
            _table(
                title,
                group,
                list(summary[self.variants[0]][group]),
                {v: [cell(v, group, name) for name in summary[v][group]] for v in self.variants},
            )
            for group in groups
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what was run where, every run's metrics, and the summary as [mean, deviation]."""
        return {
            "study": self.name,
            "title": self.title,
            "seeds": self.seeds,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "summary": self.summary(),
            "runs": [result._asdict() for result in self.results],
        }

    def write(self, folder: Path, picture: str) -> list[Path]:
        """Write NAME.json and NAME.svg; returns where they are.

        Raises:
            InputError: If the folder can't be written to.
        """
        texts = {
            folder / f"{self.name}.json": json.dumps(self.as_dict(), indent=2) + "\n",
            folder / f"{self.name}.svg": picture,
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, text in texts.items():
                replace_text(path, text)
        except OSError as error:
            raise InputError(f"--out: {folder} can't be written: {error.strerror}.") from error
        return list(texts)


def _table(title: str, corner: str, columns: list[str], rows: dict[str, list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(corner, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def accuracy(key: str, when: str = "tuned") -> Value:
    """Of a run: a figure of its protocol, tuned or zero_shot."""
    return lambda metrics: metrics[when][key]


def cost(key: str) -> Value:
    """Of a run: what it cost."""
    return lambda metrics: metrics["cost"][key]
