"""Metrics of a test by class, for metrics.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .predictions import TopClasses

if TYPE_CHECKING:
    from torch import Tensor

BALANCED = "validation_balanced"
"""Name of the balanced accuracy on the validation images, where epochs and blends are compared by it."""


def accuracy(labels: Tensor, predicted: Tensor, *, balanced: bool = False) -> float:
    """Share of right predictions in per cent; balanced, the mean over the classes with images of that of a class.

    >>> import torch
    >>> labels, predicted = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    >>> [round(accuracy(labels, predicted, balanced=how), 2) for how in (False, True)]
    [75.0, 83.33]
    """
    right = (labels == predicted).double()  # [n]
    if balanced:
        counts = labels.bincount()  # [C]
        right = (labels.bincount(right) / counts)[counts > 0]
    return 100.0 * right.mean().item()


def balanced_accuracy(labels: Tensor, predicted: Tensor) -> float:
    """Balanced `accuracy`, rounded as in metrics.json."""
    return round(accuracy(labels, predicted, balanced=True), 4)


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


def metrics_of_test(labels: Tensor, top: TopClasses, classes: Sequence[str]) -> dict[str, Any]:
    """Return what metrics.json has of a test: means over the classes with images, and the classes."""
    predicted = top.classes[:, 0]
    by_class = class_metrics(labels, predicted, classes)
    return {
        "balanced_accuracy": balanced_accuracy(labels, predicted),
        "macro_f1": round(sum(each.f1 for each in by_class) / len(by_class), 4),
        "classes": [each._asdict() for each in by_class],
    }


def most_frequent_errors(labels: Tensor, predicted: Tensor) -> dict[int, tuple[int, int]]:
    """Most frequent wrong prediction and its number of images, by label; the lower class of equally frequent ones."""
    wrong = predicted != labels
    pairs = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    most: dict[int, tuple[int, int]] = {}
    for (label, other), count in sorted(pairs.items()):
        if count > most.get(label, (0, 0))[1]:
            most[label] = other, count
    return most


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 4)
