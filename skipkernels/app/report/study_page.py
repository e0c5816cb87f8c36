"""Page of a comparison of methods: accuracies with intervals, and costs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..results.study import ACCURACY, MeanAndDeviation, Study, read_study
from . import page
from .formats import MISSING, joined, number, plural
from .intervals import LEAST_RUNS, half_interval, range_text, wilson
from .page import Section
from .parts import part
from .table import Cell, Row, Table
from .words import name_of_method, name_of_test

_SUMMARY = "harmonic"  # the accuracy that base-to-new is judged by
_WHOLE = ("peak, MiB", "parameters")  # columns without decimals
_INTERVALS = (
    f"± is the 95 % interval of the mean over seeds (Student's t), from {LEAST_RUNS} seeds on; in brackets is the 95 % "
    "interval over the test images (Wilson)."
)
_BEST = (
    " All methods have the same test images, so a difference may be certain although intervals overlap: one is best if "
    "it is ahead of each other one in every seed, and by a permutation test of the two (5 % for all tests together)."
)


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


def study_report(folder: Path) -> str:
    """Return the page of the comparison in a folder, from its compare.json."""
    return study_html(read_study(folder))


def primary(columns: Iterable[str]) -> str:
    """Return the accuracy that decides: the summary of a protocol, or else the first."""
    columns = list(columns)
    return _SUMMARY if _SUMMARY in columns else columns[0]


def headline(study: Study) -> str:
    """Return which method has the highest accuracy, and which others the data don't tell apart from it."""
    column, best = _best(study)
    if best is None:
        return study.title
    others = {} if study.comparison is None else study.comparison["others"]
    equal = [name_of_method(name) for name, of in others.items() if not of["worse"]]
    rank = "best" if others and not equal else "highest"
    measure = {_SUMMARY: "harmonic mean", "all": "accuracy"}.get(column, f"accuracy on {name_of_test(column)}")
    accuracy = _with_interval(study.summary[best][ACCURACY][column], len(study.seeds))
    images = study.images.get(column)
    counts = [plural(len(study.seeds), "seed"), *([plural(images, "test image")] if images else [])]
    sentence = f"{name_of_method(best)} has the {rank} {measure}, {accuracy} % ({', '.join(counts)})."
    return f"{sentence} These images and seeds don't tell it apart from {joined(equal)}." if equal else sentence


def _best(study: Study) -> tuple[str, str | None]:
    """Return the accuracy that decides, and the method with its highest mean; None if no method has one."""
    column = primary(next(iter(study.summary.values()))[ACCURACY])
    means = {method: of.mean for method, groups in study.summary.items() if (of := groups[ACCURACY][column])}
    return column, max(means, key=lambda method: means[method], default=None)


def _with_interval(of: MeanAndDeviation | None, seeds: int) -> str:
    """Return a mean accuracy with its interval over the seeds."""
    if of is None:
        return MISSING
    half = half_interval(of.deviation, seeds)
    return number(of.mean) + (f" ± {half:.1f}" if half else "")


def explained(study: Study) -> str:
    """Return what the intervals in the tables are, and what "best" means."""
    return f"{plural(len(study.seeds), 'seed')}. {_INTERVALS}{_BEST if study.comparison else ''}"


def tables(study: Study) -> list[Table]:
    """Return a table for each group of columns, with a row for each method."""
    _, best = _best(study)
    found = []
    for group, columns in next(iter(study.summary.values())).items():
        rows = []
        for method, groups in study.summary.items():
            cells = [_cell(study, group, column, groups[group][column]) for column in columns]
            rows.append(Row.of(name_of_method(method), *cells, style="summary" if method == best else ""))
        found.append(Table(group, list(map(name_of_test, columns)), rows))
    return found


def _cell(study: Study, group: str, column: str, of: MeanAndDeviation | None) -> Cell:
    if of is None or group != ACCURACY:
        return Cell(number(None if of is None else of.mean, ",.0f" if column in _WHOLE else ",.1f"))
    images = study.images.get(column)
    return Cell(_with_interval(of, len(study.seeds)), range_text(wilson(of.mean, images)) if images else "")
