"""Sections of the page of a run that are made of the predictions for its tests: images and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..results.class_metrics import class_metrics, metrics_of_test, most_frequent_errors
from ..results.predictions import TestPredictions, TopClasses
from ..results.thumbnails import one_per_class
from . import page
from .formats import finite, number, percent, plural
from .parts import part
from .table import Cell, Row, Table, change_cell
from .words import name_of_test

if TYPE_CHECKING:
    from torch import Tensor


def galleries(
    tests: Sequence[TestPredictions], choose: Callable[[TestPredictions], Tensor], explained: str, style: str
) -> list[Markup]:
    """Gallery of each test, of the images that `choose` returns a mask of."""
    found: dict[str, list[Markup]] = {}
    for test in tests:
        chosen = choose(test)
        indices, count = one_per_class(test.labels, chosen), int(chosen.sum())
        shown = f"{len(indices):,} of {count:,} images" if len(indices) < count else plural(count, "image")
        if indices:
            gallery = part("gallery", [_card(test, index) for index in indices], style)
            found[f"{name_of_test(test.name)}: {shown}"] = [gallery]
    return [part("text", explained), *page.groups(found)] if found else []


def _card(test: TestPredictions, index: int) -> dict[str, Any]:
    """Image with the classes that were predicted before and after tuning, and their probabilities."""
    predictions = [("zero-shot", _listed(test, test.zero_shot, index)), ("tuned", _listed(test, test.tuned, index))]
    label = test.classes[int(test.labels[index])]
    return {"label": label, "image": test.thumbnails.get(index), "predictions": predictions}


def _listed(test: TestPredictions, top: TopClasses | None, index: int) -> list[dict[str, Any]]:
    """The most probable classes of an image; empty without predictions."""
    if top is None:
        return []
    label = int(test.labels[index])
    pairs = zip(top.classes[index].tolist(), top.probabilities[index].tolist(), strict=True)
    return [
        {"name": test.classes[found], "probability": value if finite(value) else None, "correct": found == label}
        for found, value in pairs
    ]


def classes(test: TestPredictions) -> list[Markup]:
    """Table of the classes of a test."""
    before = class_metrics(test.labels, test.zero_shot.classes[:, 0], test.classes)
    last = metrics_of_test(test.labels, test.last, test.classes)
    most = most_frequent_errors(test.labels, test.last.classes[:, 0])
    rows = []
    for label, was, now in zip(test.labels.unique().tolist(), before, last["classes"], strict=True):
        tuned = None if test.tuned is None else now["recall"]
        change = None if tuned is None else tuned - was.recall
        other, errors = most.get(label, (None, 0))
        taken = "" if other is None else f"{test.classes[other]} ({errors})"
        cells: list[str | Cell] = [f"{was.images:,}", *map(number, (was.recall, tuned)), change_cell(change)]
        cells += [number(now["precision"]), number(now["f1"]), Cell(taken, style="left", order=errors)]
        rows.append(Row.of(was.name, *cells))
    text = (
        f"Mean over the classes: accuracy {percent(last['balanced_accuracy'])}, F1 {percent(last['macro_f1'])}. "
        "Precision and F1 are those of the tuned model; predictions.csv has every image."
    )
    columns = ["images", "zero-shot, %", "tuned, %", "change", "precision, %", "F1, %", "most often taken for"]
    return [part("text", text), Table("class", columns, rows, searched=True).html]
