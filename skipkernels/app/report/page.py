"""Pages of results: a sentence, the parts of the first screen, and sections; and tables, also in the terminal.

The templates in `templates` escape every value. A page loads nothing, and runs no other script than its own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...formatting import decimal
from .formats import MISSING, number, plural, share

_OPEN = 2  # groups of a section that are open at first


def render(template: str, **values: Any) -> str:
    """Return a page. Lone surrogates, of file names that are not in UTF-8, become "?"."""
    return _environment().get_template(template).render(values).encode(errors="replace").decode()


def part(name: str, *values: Any) -> Markup:
    """Return a part of a page, by a macro of parts.html.j2."""
    return getattr(_environment().get_template("parts.html.j2").module, name)(*values)


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("skipkernels.app.report")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )

    def source(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    environment.globals |= {"source": source, "policy": _policy}
    environment.filters |= {each.__name__: each for each in (decimal, number, plural, share, image_source)}
    return environment


def _policy(script: str, others: str = "img-src data:") -> str:
    """Content security policy of a page: a browser runs no other script than this one, whatever a class is called.

    `others` are further directives, about what the page loads.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; {others}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def image_source(data: bytes) -> str:
    """Address of an image with its data."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


# ---- tables ----------------------------------------------------------------------------------------------------------


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


def row(name: str, *cells: str | Cell, style: str = "") -> Row:
    """Row from texts and cells."""
    return Row(name, [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells], style)


def change_cell(change: float | None) -> Cell:
    """Cell with a change of an accuracy, in the colour of its sign."""
    style = "" if not change else "better" if change > 0 else "worse"
    return Cell(number(change, "+.1f"), style=style, order=change)


def facts(values: Mapping[str, Any]) -> Table:
    """Table of names and texts; missing values are left out."""
    known = {name: str(value) for name, value in values.items() if value not in (None, "", MISSING)}
    return Table("", [], [row(name, Cell(value, style="left")) for name, value in known.items()])


# ---- sections --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """Section with its address on the page; one without parts is left out."""

    name: str
    title: str
    parts: Sequence[Markup]


def page_html(title: str, date: str, headline: str, first: Sequence[Markup], sections: Sequence[Section]) -> str:
    """Return the page; `first` are the parts of its first screen."""
    shown = [section for section in sections if section.parts]
    return render("page.html.j2", title=title, date=date[:10], headline=headline, first=first, sections=shown)


def groups(parts: Mapping[str, Sequence[Markup]]) -> list[Markup]:
    """Groups of parts by their summaries, which open and close them; the first are open."""
    return [part("group", summary, of, place < _OPEN) for place, (summary, of) in enumerate(parts.items())]


def reproduction(command: str, values: Mapping[str, Any], environment: Mapping[str, Any], settings: str) -> Section:
    """Section with the command, and the versions and machine of `environment`."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    known = {"versions": versions, "machine": environment["machine"], "date": environment["finished"]}
    parts = [part("code", command, True)] if command else []
    parts.append(facts({**values, **known}).html)
    parts += [part("group", "All settings", [part("code", settings)], False)] if settings else []
    return Section("reproduce", "Reproduce", parts)
