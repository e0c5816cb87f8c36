"""Tables of results, on pages and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .formats import MISSING, finite, number
from .parts import part


@dataclass(frozen=True)
class Cell:
    """Cell of a table."""

    text: str
    note: str = ""  # in brackets
    style: str = ""  # CSS class
    order: float | None = None  # value by which the column is sorted, if it is not the text

    def __str__(self) -> str:
        return f"{self.text} ({self.note})" if self.note else self.text


@dataclass(frozen=True)
class Row:
    """Row of a table."""

    name: str
    cells: Sequence[Cell]
    style: str = ""  # CSS class

    @classmethod
    def of(cls, name: str, *cells: str | Cell, style: str = "") -> Row:
        """Row from texts and cells."""
        return cls(name, [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells], style)


@dataclass(frozen=True)
class Table:
    """Table with a name in front of each row; `searched` gives it a search and buttons that sort it."""

    corner: str  # above the names
    columns: Sequence[str]
    rows: Sequence[Row]
    searched: bool = False

    @property
    def html(self) -> Markup:
        """Part of a page."""
        return part("table", self)

    def in_terminal(self, title: str | None = None) -> Any:
        """Table of rich."""
        from rich.table import Table as RichTable

        table = RichTable(self.corner, title=title, title_justify="left", show_header=bool(self.columns))
        for column in self.columns or [""]:
            table.add_column(column, justify="right" if self.columns else "left")
        for row in self.rows:
            table.add_row(row.name, *map(str, row.cells), style="bold" if row.style == "summary" else None)
        return table


def change_cell(change: float | None) -> Cell:
    """Cell with a change of an accuracy, in the colour of its sign."""
    shown = round(change, 1) if finite(change) else 0
    style = "" if not shown else "better" if shown > 0 else "worse"
    return Cell(number(change, "+.1f"), style=style, order=change)


def facts_table(values: Mapping[str, Any]) -> Table:
    """Table of names and texts; missing values are left out."""
    known = {name: str(value) for name, value in values.items() if value not in (None, "", MISSING)}
    return Table("", [], [Row.of(name, Cell(value, style="left")) for name, value in known.items()])
