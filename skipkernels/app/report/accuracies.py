"""Rows of the table of accuracies of a run, from metrics.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..train.class_metrics import VALIDATION


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
    return name, round(100 * sizes[name] / sum(sizes.values()), 4)


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
            balanced = (None if part is None else part["balanced_accuracy"] for part in of_test)
            found.append(AccuracyRow(test, f"{test}, balanced", *balanced))
            found.append(AccuracyRow(test, f"{test}, always {name}", share, share))
        found.append(AccuracyRow(test, test, before, after_of.get(test)))
    return found
