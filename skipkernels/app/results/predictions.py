"""Predictions of a run for its test images, and thumbnails of some of them: what the report is made from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ...formatting import csv_line

if TYPE_CHECKING:
    from torch import Tensor

TOP = 3
"""Classes per image that are kept."""


class TopClasses(NamedTuple):
    """Classes with the largest probabilities of n images, descending: [n, k] each, with k ≤ `TOP`.

    The probabilities are the softmax over the classes of the test at the scale of the model; they are not calibrated.
    """

    classes: Tensor
    probabilities: Tensor


def top_classes(logits: Tensor) -> TopClasses:
    """Return the classes with the largest of logits [n, C]; probabilities are NaN if a logit is NaN or +inf."""
    from ...retrieval import largest

    probabilities, classes = largest(logits.softmax(dim=1), min(TOP, logits.shape[1]))
    return TopClasses(classes, probabilities)


@dataclass
class TestPredictions:
    """Predictions for the images of a test."""

    __test__ = False  # not a pytest class

    name: str
    classes: list[str]  # names by label
    labels: Tensor  # int64 [n]
    zero_shot: TopClasses
    tuned: TopClasses | None
    images: list[str]  # names of the images
    thumbnails: dict[int, bytes] = field(default_factory=dict)  # PNG or JPEG files by the index of the image

    @property
    def last(self) -> TopClasses:
        """Predictions after tuning, or those before if there are none."""
        return self.zero_shot if self.tuned is None else self.tuned

    def fixed(self) -> Tensor:
        """Mask [n] of the images that only the tuned model classifies correctly."""
        return (self.zero_shot.classes[:, 0] != self.labels) & (self.last.classes[:, 0] == self.labels)

    def broken(self) -> Tensor:
        """Mask [n] of the images that only the model before tuning classifies correctly."""
        return (self.zero_shot.classes[:, 0] == self.labels) & (self.last.classes[:, 0] != self.labels)


def prediction_lines(tests: Sequence[TestPredictions]) -> Iterator[str]:
    """Yield the lines of predictions.csv: the classes with the largest probabilities of each test image, best first."""
    columns = ["test", "image", "label", "zero_shot", "predicted", "probability"]
    for place in range(2, 1 + max((test.last.classes.shape[1] for test in tests), default=1)):
        columns += [f"predicted_{place}", f"probability_{place}"]
    yield csv_line(columns)
    for test in tests:
        before, top = test.zero_shot.classes[:, 0].tolist(), test.last
        labels, ids, probabilities = test.labels.tolist(), top.classes.tolist(), top.probabilities.tolist()
        for index, image in enumerate(test.images):
            cells = [test.name, image, test.classes[labels[index]], test.classes[before[index]]]
            for class_id, probability in zip(ids[index], probabilities[index], strict=True):
                cells += [test.classes[class_id], f"{probability:.6g}"]
            yield csv_line(cells)
