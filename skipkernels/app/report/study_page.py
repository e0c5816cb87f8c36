"""Page of a comparison of methods: accuracies with intervals, and costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import page
from .formats import MISSING, joined, number, plural
from .intervals import LEAST_RUNS, half_interval, range_text, wilson
from .page import Cell, Section, Table, part, row
from .words import name_of_method, name_of_test

ACCURACY, COST = "accuracy, %", "cost"
TIME = "tuning, s"
"""Titles of tables, and of a column of the costs."""
_SUMMARY = "harmonic"  # the accuracy that base-to-new is judged by


class MeanAndDeviation(NamedTuple):
    """Mean and sample standard deviation over runs; the deviation of a single run is None."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Study:
    """Contents of compare.json."""

    title: str
    command: str
    seeds: list[int]
    finished: str
    versions: dict[str, str]
    machine: str
    threads: int
    summary: dict[str, dict[str, dict[str, MeanAndDeviation | None]]]  # by method, title of a table and column
    comparison: dict[str, Any] | None  # of the best method with the others
    runs: list[dict[str, Any]]  # fields of `Result`

    @property
    def images(self) -> dict[str, int]:
        """Number of test images by column of accuracies."""
        return self.runs[0]["metrics"]["images"]["tests"]


def study_html(study: Study) -> str:
    """Return the page of a study, the contents of its compare.json."""
    accuracies, *others = tables(study)
    seeds = ", ".join(map(str, study.seeds))
    return page.page_html(
        study.title,
        study.finished,
        headline(study),
        [accuracies.html, part("text", explained(study))],
        [
            Section("more", "Cost", [table.html for table in others]),
            page.reproduction(study.command, {"seeds": seeds}, vars(study), ""),
        ],
    )


def primary(columns: Iterable[str]) -> str:
    """Return the accuracy that decides: the summary of a protocol, or else the first."""
    columns = list(columns)
    return _SUMMARY if _SUMMARY in columns else columns[0]


def headline(study: Study) -> str:
    """Return the result in a sentence."""
    summary, seeds, comparison = study.summary, len(study.seeds), study.comparison or {}
    column, found, leaders = _best(study)
    if not leaders:
        return study.title
    others = {name: of for name, of in comparison.get("others", {}).items() if name not in leaders}
    equal = [name_of_method(name) for name, of in others.items() if not of["worse"]]
    best, one = leaders[0], len(leaders) == 1
    certain = one and comparison.get("best") == best and not equal
    mean, half = found[best][0], half_interval(found[best][1], seeds) if one else 0.0
    rank, name = "best" if certain else "highest", joined(map(name_of_method, leaders))
    several = f"The {rank} {_measure(column)} is that of {name}, "
    sentence = several if len(summary) > 1 else f"The {_measure(column)} of {name} is "
    sentence += f"{number(mean)}{f' ± {half:.1f}' if half else ''} %"
    if one and (time := summary[best][COST][TIME]):
        sentence += f", after {number(time[0], ',.1f')} s of tuning"
    images = study.images.get(column)
    counts = [plural(seeds, "seed"), *([plural(images, "test image")] if images else [])]
    sentence += f" ({', '.join(counts)})"
    if equal:
        names = "any other" if len(equal) == len(others) > 1 else ", ".join(equal)
        sentence += f", but these images and seeds don't tell {'it' if one else 'them'} apart from {names}"
    return f"{sentence}."


def _best(study: Study) -> tuple[str, dict[str, MeanAndDeviation], list[str]]:
    """Name of the accuracy that decides, this accuracy by method, and the methods with the highest, as it is shown."""
    summary = study.summary
    column = primary(next(iter(summary.values()))[ACCURACY])
    found = {name: of for name, groups in summary.items() if (of := groups[ACCURACY][column])}
    shown = {name: round(mean, 1) for name, (mean, _) in found.items()}
    return column, found, [name for name, mean in shown.items() if mean == max(shown.values())]


def _measure(column: str) -> str:
    if column == _SUMMARY:
        return f"{name_of_test(column)} accuracy"
    return "accuracy" if column == "all" else f"accuracy on {name_of_test(column)}"


def explained(study: Study) -> str:
    """Return what the intervals in the tables are, and what "best" means."""
    seeds = len(study.seeds)
    text = f"Means of {seeds} seeds" if seeds > 1 else "One seed"
    over_seeds = "; ±: 95 % interval of the mean over seeds (Student's t)"
    text += over_seeds if seeds >= LEAST_RUNS else ", too few for an interval over seeds"
    text += "; in brackets the 95 % interval over the test images (Wilson)"
    if study.comparison:
        text += (
            ". All methods have the same test images, so a difference may be certain although intervals overlap: one "
            "is best if it is ahead of each other one in every seed, and by a permutation test of the two (5 % for "
            "all tests together)"
        )
    return f"{text}."


def tables(study: Study) -> list[Table]:
    """Return a table for each group of columns, with a row for each method."""
    summary, seeds, images = study.summary, len(study.seeds), study.images

    def cell(of: MeanAndDeviation | None, digits: int, interval: bool, count: int | None) -> Cell:
        if not of:
            return Cell(MISSING)
        half = half_interval(of[1], seeds) if interval else 0.0
        text = number(of[0], f",.{digits}f") + (f" ± {half:,.{digits}f}" if half else "")
        return Cell(text, range_text(wilson(of[0], count)) if count else "")

    *_, leaders = _best(study)
    found = []
    for group, columns in next(iter(summary.values())).items():
        rows, accuracy = [], group == ACCURACY
        for method, groups in summary.items():
            cells = []
            for name in columns:
                digits = 0 if name in ("peak, MiB", "parameters") else 1
                cells.append(cell(groups[group][name], digits, accuracy, images.get(name) if accuracy else None))
            rows.append(row(name_of_method(method), *cells, style="summary" if method in leaders else ""))
        found.append(Table(group, [name_of_test(name) for name in columns], rows))
    return found
