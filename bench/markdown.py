"""Numbers as text, and Markdown: the cells and tables that `bench.report` writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from .pictures import Row, number
from .stored import KINDS


def figure(value: float | None, unit: str = "") -> str:
    """Three digits, or all of them before the point.

    >>> figure(0.2714), figure(12.71, " ms"), figure(48188.4), figure(0.0), figure(None, " ms")
    ('0.271', '12.7 ms', '48,188', '0', '')
    """
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}{unit}"


def times(value: float | None) -> str:
    """How many times; in bold what is less than once, however little.

    >>> times(2.444), times(38.21), times(0.63), times(0.9971), times(None)
    ('2.44', '38.2', '**0.63**', '**0.997**', '')
    """
    if value is None:
        return ""
    if value < 1:
        return f"**{value:.{3 if value >= 0.995 else 2}f}**"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def span(values: Iterable[float]) -> str:
    """From the least to the most.

    >>> span([1.5, 0.63, 1.1]), span([2.0])
    ('**0.63** to 1.50', '2.00')
    """
    found = list(values)
    return " to ".join(dict.fromkeys(map(times, (min(found), max(found)))))


def classes(C: str) -> str:
    """1,000 classes."""
    return f"{int(C):,} classes"


Cell = Callable[[Row], str]


def text(column: str) -> Cell:
    return lambda row: row[column]


def count(column: str) -> Cell:
    return lambda row: f"{int(row[column]):,}" if row[column] else ""


def size(column: str, unit: str = "") -> Cell:
    return lambda row: figure(number(row, column), unit)


def ratio(column: str) -> Cell:
    return lambda row: times(number(row, column))


def quantiles(row: Row) -> str:
    """Between which the middle three fifths of the times are."""
    return f"{figure(number(row, 'p20_ms'))} to {figure(number(row, 'p80_ms'))}" if row["p50_ms"] else ""


def case_of(known: Mapping[str, str]) -> dict[str, Cell]:
    """Columns that say which step, but for what is known."""
    columns: dict[str, Cell] = {"model": text("model"), "B": text("B"), "precision": text("precision")}
    columns |= {"classes": lambda row: f"{int(row['K']):,} of {int(row['C']):,}"}
    return {name: cell for name, cell in columns.items() if name not in known}


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Without the columns in which nothing stands."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    kept = [place for place in range(len(header)) if place == 0 or any(line[place] for line in cells)]
    return "\n".join(
        f"| {' | '.join(line[place] for place in kept)} |" for line in [header, ["---"] * len(header), *cells]
    )


def listed(rows: Iterable[Row], columns: Mapping[str, Cell]) -> str:
    """A table with a line for each row."""
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def origin(rows: Mapping[str, Sequence[Row]]) -> str:
    """The small line under a table: where its rows, by their kind, come from."""

    def of(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for each in rows.values() for row in each))

    commands = ", ".join(f"`python -m {KINDS[kind].command}`" for kind, each in rows.items() if each)
    return f"<sub>{of('device')}, {of('threads')} threads; torch {of('torch')}; commit {of('commit')}; {commands}</sub>"


def folded(title: str, content: str) -> str:
    """Shown on a click."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
