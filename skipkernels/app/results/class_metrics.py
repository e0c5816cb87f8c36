"""Metrics of a test by class, for metrics.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .predictions import TopClasses

if TYPE_CHECKING:
    from torch import Tensor

BALANCED = "validation_balanced"
"""Name of the balanced accuracy on the validation images, where epochs and blends are compared by it."""


def image_scores(labels: Tensor, predicted: Tensor, *, balanced: bool) -> Tensor:
    """Scores [n] of images, 0 for a wrong prediction; their mean is the accuracy in per cent, or the balanced one.

    The balanced accuracy is the mean over the C classes with images. Of n images, those of a class with n_c weigh
    n / (C n_c): the mean over all images of these weights times right or wrong is the sum over classes of recall / C.

    >>> import torch
    >>> labels, predicted = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    >>> [round(image_scores(labels, predicted, balanced=how).mean().item(), 2) for how in (False, True)]
    [75.0, 83.33]
    """
    scores, counts = 100.0 * (labels == predicted).double(), labels.bincount()
    return scores * len(labels) / ((counts > 0).sum() * counts[labels]) if balanced else scores


def balanced_accuracy(labels: Tensor, predicted: Tensor) -> float:
    """Mean over the classes with images of the share of their images that are predicted as them, in per cent."""
    return round(image_scores(labels, predicted, balanced=True).mean().item(), 4)


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


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 4)
