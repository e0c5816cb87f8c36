"""Metrics of a test by class, for metrics.json, and its predictions as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...formatting import csv_line
from .predictions import TestPredictions, TopClasses

if TYPE_CHECKING:
    from torch import Tensor

VALIDATION = "validation"
"""Name of the validation images beside the names of the tests."""


def class_weights(labels: Tensor, classes: int, exponent: float = 1.0) -> Tensor:
    """Weights [C] of an image of each class: n_c^−exponent for n_c images, divided by their mean over all images.

    With exponent 1 all classes weigh the same.

    >>> import torch
    >>> labels = torch.tensor([0, 0, 0, 0, 1])
    >>> class_weights(labels, 2).float(), class_weights(labels, 2, exponent=0.5).float()
    (tensor([0.6250, 2.5000]), tensor([0.8333, 1.6667]))
    """
    counts = labels.bincount(minlength=classes).double()
    weights = counts.clamp(min=1) ** -exponent
    return weights * (len(labels) / (weights @ counts))


def image_scores(labels: Tensor, predicted: Tensor, *, balanced: bool) -> Tensor:
    """Scores [n] of images, 0 for a wrong prediction; their mean is the accuracy in per cent, or the balanced one.

    The balanced accuracy is the mean over the classes with images.

    >>> import torch
    >>> labels, predicted = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    >>> [image_scores(labels, predicted, balanced=balanced).mean().item() for balanced in (False, True)]
    [75.0, 83.33333333333333]
    """
    scores = 100.0 * (labels == predicted).double()
    return scores * class_weights(labels, 0)[labels] if balanced else scores


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
    found = class_metrics(labels, predicted, classes)
    return {
        "balanced_accuracy": round(image_scores(labels, predicted, balanced=True).mean().item(), 4),
        "macro_f1": round(sum(each.f1 for each in found) / len(found), 4),
        "classes": [each._asdict() for each in found],
    }


class AccuracyRow(NamedTuple):
    """Row of a table of accuracies, in per cent.

    Attributes:
        test: Name of the test, or of a summary of the protocol.
        label: Name of the row: that of the test, for its accuracy; or with ", balanced" for the mean over its classes,
            and ", always CLASS" for the accuracy of always answering its largest class.
        before: Accuracy before tuning.
        after: Accuracy after it.
    """

    test: str
    label: str
    before: float | None
    after: float | None


def largest_class(of_test: Mapping[str, Any] | None) -> tuple[str, float] | None:
    """Return the name of the largest class of a test, and its share of the images in per cent.

    None if all classes have equally many images: then the accuracy is the balanced one.

    >>> largest_class({"classes": [{"name": "cat", "images": 3}, {"name": "dog", "images": 1}]})
    ('cat', 75.0)
    """
    sizes = {each["name"]: each["images"] for each in of_test["classes"]} if of_test else {}
    if len(set(sizes.values())) < 2:
        return None
    name = max(sizes, key=lambda each: sizes[each])
    return name, _percent(sizes[name], sum(sizes.values()))


def accuracy_rows(metrics: Mapping[str, Any]) -> list[AccuracyRow]:
    """Return the accuracies in metrics.json: of each test, of the summaries, and on the validation images.

    If the classes of a test have different numbers of images, its balanced accuracy and that of always answering the
    largest class come first: an accuracy near the latter says little.
    """
    before_of, after_of = (dict(metrics[part]) for part in ("zero_shot", "tuned"))
    if (held := metrics["validation"]) is not None:
        before_of[VALIDATION], after_of[VALIDATION] = held["zero_shot"], held["tuned"]
    by_class = [metrics[part] for part in ("zero_shot_by_class", "by_class")]
    found = []
    for test, before in before_of.items():
        of_test = [part.get(test) for part in by_class]
        if (largest := largest_class(of_test[0])) is not None:
            name, share = largest
            found.append(AccuracyRow(test, f"{test}, balanced", *(of and of["balanced_accuracy"] for of in of_test)))
            found.append(AccuracyRow(test, f"{test}, always {name}", share, share))
        found.append(AccuracyRow(test, test, before, after_of.get(test)))
    return found


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
