"""Tables that are committed and held against what is found anew, a line for each row: bench.aot's and bench.counts'."""

from __future__ import annotations

import csv
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R", bound=Any)
"""A named tuple of strings and integers, with a key by which rows are told apart, and a name."""


def read(path: Path, kind: type[R]) -> list[R]:
    """Rows of a table; none where there is no file."""
    if not path.exists():
        return []
    integers = {name for name, hint in typing.get_type_hints(kind).items() if hint is int}
    with path.open(newline="") as file:
        return [
            kind(**{name: int(value) if name in integers else value for name, value in line.items()})
            for line in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[R]) -> None:
    """The table anew, with a header."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)


def compare(
    rows: Sequence[R], table: Sequence[R], path: Path, makes: str, worse: Callable[[R, R], Iterator[str]]
) -> Iterator[str]:
    """Where rows are not those of `table`, the part of the file at `path` that was asked for: missing, worse by
    `worse(committed, row)`, or stale, since nothing `makes` them any more."""
    committed = {row.key: row for row in table}
    for row in rows:
        if row.key not in committed:
            yield f"{row.name} is missing from {path.name}"
        else:
            yield from worse(committed[row.key], row)
    for key in committed.keys() - {row.key for row in rows}:
        yield f"{committed[key].name} is in {path.name} but nothing {makes} it"
