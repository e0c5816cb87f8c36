"""Printed tables, committed CSV tables of NamedTuples, and their comparison with new rows."""

from __future__ import annotations

import csv
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

R = TypeVar("R", bound=Any)
"""A NamedTuple of strings and integers with the properties `key`, which identifies a row, and `name`."""


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print a table as wide as it is; integers get thousands separators."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row))
    Console(width=10_000).print(table)  # else cells would be cut off


def read(path: Path, kind: type[R]) -> list[R]:
    """Read the rows of a table; none if there is no file."""
    if not path.exists():
        return []
    integers = {name for name, hint in typing.get_type_hints(kind).items() if hint is int}
    with path.open(newline="") as file:
        return [
            kind(**{name: int(value) if name in integers else value for name, value in line.items()})
            for line in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[R]) -> None:
    """Write a table with a header."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)


def exit_with(problems: Sequence[str], compared: str) -> None:
    """Print the problems, what was compared, and how many there are; exit with 1 if there are any."""
    for problem in problems:
        print(problem)
    print(f"{compared}, {len(problems)} problems")
    if problems:
        raise SystemExit(1)


def compare(
    rows: Sequence[R], table: Sequence[R], path: Path, makes: str, worse: Callable[[R, R], Iterator[str]]
) -> Iterator[str]:
    """Yield the differences between new rows and `table`, the selected part of the file at `path`: missing rows, the
    differences of `worse(committed, row)`, and stale rows, which nothing `makes` any more."""
    committed, made = ({row.key: row for row in each} for each in (table, rows))
    for key, row in made.items():
        if key not in committed:
            yield f"{row.name} is missing from {path.name}"
        else:
            yield from worse(committed[key], row)
    for key, row in committed.items():
        if key not in made:
            yield f"{row.name} is in {path.name} but nothing {makes} it"
