"""Pages of results: a sentence, the parts of the first screen, and sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .parts import part, render
from .table import facts_table


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
    """Groups of parts by their summaries, which open and close them."""
    return [part("group", summary, of, True) for summary, of in parts.items()]


def reproduction(command: str, values: Mapping[str, Any], environment: Mapping[str, Any], settings: str) -> Section:
    """Section with the command, and the versions and machine of `environment`."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    known = {"versions": versions, "machine": environment["machine"], "date": environment["finished"]}
    parts = [part("code", command, True)] if command else []
    parts.append(facts_table({**values, **known}).html)
    parts += [part("group", "All settings", [part("code", settings)], False)] if settings else []
    return Section("reproduce", "Reproduce", parts)
