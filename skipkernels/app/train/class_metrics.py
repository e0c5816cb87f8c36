"""Metrics of a test by class, for metrics.json, and its predictions and confusions as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...formatting import csv_line
from ..data.tasks import TestSet
from .predictions import TestPredictions, TopClasses

if TYPE_CHECKING:
    from torch import Tensor

MOST_CONFUSED = 20  # pairs in metrics.json


class ClassMetrics(NamedTuple):
    """Metrics of a class, in per cent.

    Attributes:
        name: Name of the class.
        images: Number of its images.
        recall: Share of its images that are predicted as it.
        precision: Share of the images predicted as it that are of it; None if there are none.
        f1: Harmonic mean of both; 0 without a correct prediction.
    """

    name: str
    images: int
    recall: float
    precision: float | None
    f1: float


def class_metrics(labels: Tensor, predicted: Tensor, classes: Sequence[str]) -> list[ClassMetrics]:
    """Return the metrics of each class with images, by label.

    >>> import torch
    >>> for each in class_metrics(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), ["cat", "dog"]):
    ...     print(*each)
    cat 2 50.0 100.0 66.6667
    dog 1 100.0 50.0 66.6667
    """
    count = len(classes)
    images, guesses = (x.bincount(minlength=count).tolist() for x in (labels, predicted))
    right = labels[labels == predicted].bincount(minlength=count).tolist()
    return [
        ClassMetrics(
            name,
            images[label],
            _percent(right[label], images[label]),
            _percent(right[label], guesses[label]) if guesses[label] else None,
            _percent(2 * right[label], images[label] + guesses[label]),
        )
        for label, name in enumerate(classes)
        if images[label]
    ]


def metrics_by_class(
    tests: Iterable[TestSet], labels: Mapping[str, Tensor], top: Mapping[str, TopClasses]
) -> dict[str, Any]:
    """Return "by_class" or "zero_shot_by_class" of metrics.json: the metrics of each test with predictions `top`."""
    return {
        test.name: metrics_of_test(labels[test.name], top[test.name], test.classes)
        for test in tests
        if test.name in top
    }


def metrics_of_test(labels: Tensor, top: TopClasses, classes: Sequence[str]) -> dict[str, Any]:
    """Return what metrics.json has of a test: means over the classes with images, the classes, and what is confused."""
    predicted = top.classes[:, 0]
    found = class_metrics(labels, predicted, classes)
    wrong = sorted(
        (pair for pair in confusions(labels, predicted) if pair[0] != pair[1]), key=lambda pair: (-pair[2], pair)
    )
    return {
        "balanced_accuracy": round(sum(each.recall for each in found) / len(found), 4),
        "macro_f1": round(sum(each.f1 for each in found) / len(found), 4),
        "classes": [each._asdict() for each in found],
        "most_confused": [
            {"label": classes[label], "predicted": classes[other], "images": images}
            for label, other, images in wrong[:MOST_CONFUSED]
        ],
    }


def confusions(labels: Tensor, predicted: Tensor) -> list[tuple[int, int, int]]:
    """Return label, prediction and number of images of each pair that occurs, in the order of both.

    >>> import torch
    >>> confusions(torch.tensor([1, 0, 0]), torch.tensor([1, 1, 1]))
    [(0, 1, 2), (1, 1, 1)]
    """
    import torch

    pairs, counts = torch.stack([labels, predicted], dim=1).unique(dim=0, return_counts=True)
    return [(*pair, count) for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)]


def confusion_lines(tests: Sequence[TestPredictions]) -> Iterator[str]:
    """Yield the lines of confusion.csv: how many images of a class are predicted as which."""
    yield csv_line(["test", "label", "predicted", "images"])
    for test in tests:
        for label, other, images in confusions(test.labels, test.last.classes[:, 0]):
            yield csv_line([test.name, test.classes[label], test.classes[other], images])


def prediction_lines(tests: Sequence[TestPredictions]) -> Iterator[str]:
    """Yield the lines of predictions.csv: the classes with the largest probabilities of each test image, best first."""
    most = max((test.last.classes.shape[1] for test in tests), default=1)
    numbers = ["", *(f"_{n}" for n in range(2, most + 1))]
    yield csv_line(
        ["test", "image", "label", "zero_shot", *(f"{x}{n}" for n in numbers for x in ("predicted", "probability"))]
    )
    for test in tests:
        names, top = test.classes, test.last
        known = zip(test.images, test.labels.tolist(), test.zero_shot.classes[:, 0].tolist(), strict=True)
        for (image, label, before), ids, shares in zip(
            known, top.classes.tolist(), top.probabilities.tolist(), strict=True
        ):
            cells = [cell for i, p in zip(ids, shares, strict=True) for cell in (names[i], f"{p:.6g}")]
            yield csv_line([test.name, image, names[label], names[before], *cells])


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 4)
