"""Statistics of the predictions of a run, and selection of the test images that the report shows."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data import SizedDataset
from ..data.tasks import TestSet
from ..train.predictions import TestPredictions, TopClasses

GALLERY, PAIRS, WORST = 8, 6, 30
"""Largest number of images in a gallery, of pairs of confused classes, and of classes in the matrix of confusions."""
_MAX_SIDE = 128  # longer side of a thumbnail, in pixels
_PIXEL_ART = 64  # images up to this size are stored without loss


@dataclass(frozen=True)
class ConfusedPair:
    """Class that is often predicted as another class."""

    label: int
    predicted: int  # The other class
    index: int  # Test image of the class, predicted as the other class
    predicted_index: int | None  # Test image of the other class, if there is one
    count: int  # Number of images of the class that are predicted as the other class
    total: int  # Number of test images of the class


def _errors(test: TestPredictions) -> dict[tuple[int, int], list[int]]:
    """Indices of the wrongly predicted images, by label and prediction."""
    predicted = test.last.classes[:, 0]
    found: dict[tuple[int, int], list[int]] = {}
    for index in (predicted != test.labels).nonzero().flatten().tolist():
        found.setdefault((int(test.labels[index]), int(predicted[index])), []).append(index)
    return found


def most_frequent_errors(test: TestPredictions) -> dict[int, tuple[int, int]]:
    """Most frequent wrong prediction and its number of images, by label; the lower class of equally frequent ones."""
    most: dict[int, tuple[int, int]] = {}
    for (label, predicted), indices in sorted(_errors(test).items()):
        if len(indices) > most.get(label, (0, 0))[1]:
            most[label] = predicted, len(indices)
    return most


def changed(test: TestPredictions) -> tuple[Tensor, Tensor]:
    """Return masks [n] of the images that only the tuned, and that only the untuned model classifies correctly."""
    before, after = (top.classes[:, 0] == test.labels for top in (test.zero_shot, test.last))
    return ~before & after, before & ~after


def one_per_class(labels: Tensor, chosen: Tensor, limit: int = GALLERY) -> list[int]:
    """Indices of at most `limit` of the chosen images, of different classes, evenly spaced."""
    first_of = {int(labels[index]): index for index in reversed(chosen.nonzero().flatten().tolist())}
    found = [first_of[label] for label in sorted(first_of)]
    count = min(limit, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def confused_pairs(test: TestPredictions, *, limit: int = PAIRS) -> list[ConfusedPair]:
    """Select the classes with the most errors, each with its most frequent wrong prediction, in ties by label."""
    errors, most = _errors(test), most_frequent_errors(test)
    totals = test.labels.bincount(minlength=len(test.classes)).tolist()
    found = []
    for label in _by_errors(test)[:limit]:
        predicted, count = most[label]
        others = (test.labels == predicted).nonzero()
        other = int(others[0]) if len(others) else None
        found.append(ConfusedPair(label, predicted, errors[label, predicted][0], other, count, totals[label]))
    return found


def _by_errors(test: TestPredictions) -> list[int]:
    """Labels with errors, those with the most first; the lower label in ties."""
    wrong = test.labels[test.last.classes[:, 0] != test.labels].bincount(minlength=len(test.classes))
    count = int((wrong > 0).sum())
    return wrong.sort(descending=True, stable=True).indices[:count].tolist()


def confusion_matrix(test: TestPredictions, *, limit: int = WORST) -> tuple[list[int], list[list[int]]]:
    """Count the predictions of the classes with the most errors, or of all if there are at most `limit` classes.

    Returns labels [n], and counts [n, n + 1]: images of a class (row) predicted as each of these classes, or as any
    other (last column). Both are empty without errors.
    """
    labels = _by_errors(test)[:limit]
    if labels and len(test.classes) <= limit:
        labels = list(range(len(test.classes)))
    place = torch.full((len(test.classes),), len(labels))
    place[labels] = torch.arange(len(labels))
    rows, columns = place[test.labels], place[test.last.classes[:, 0]]
    chosen, width = rows < len(labels), len(labels) + 1
    counts = (rows * width + columns)[chosen].bincount(minlength=len(labels) * width)
    return labels, counts.view(len(labels), width).tolist()


def predictions_with_thumbnails(
    test: TestSet, labels: Tensor, zero_shot: TopClasses, tuned: TopClasses | None
) -> TestPredictions:
    """Collect the predictions for a test, and read the images that the report shows, without their transform."""
    found = TestPredictions(test.name, list(test.classes), labels, zero_shot, tuned, list(test.images.names))
    add_thumbnails(found, test.images.with_transform(None))
    return found


def add_thumbnails(test: TestPredictions, images: SizedDataset) -> None:
    """Read the images that the report shows, and add them to the predictions of their test."""
    pairs = confused_pairs(test)
    shown = [index for chosen in changed(test) for index in one_per_class(test.labels, chosen)]
    shown += [pair.index for pair in pairs]
    shown += [pair.predicted_index for pair in pairs if pair.predicted_index is not None]
    test.thumbnails = {index: encoded(images[index][0]) for index in dict.fromkeys(shown)}


def encoded(image: Any) -> bytes:
    """Return the thumbnail of an image as a file: PNG up to 64 pixels a side, else JPEG."""
    small, buffer = thumbnail(image), io.BytesIO()
    small.save(buffer, "png" if max(small.size) <= _PIXEL_ART else "jpeg", quality=80)
    return buffer.getvalue()


def thumbnail(image: Any) -> Image.Image:
    """Convert a PIL image, or a tensor scaled to its range, to RGB, at most 128 pixels a side.

    >>> thumbnail(Image.new("RGB", (4000, 3000))).size, thumbnail(torch.randn(3, 32, 32)).size
    ((128, 96), (32, 32))
    """
    if isinstance(image, Tensor):
        least, most = image.aminmax()
        from torchvision.transforms.functional import to_pil_image

        return thumbnail(to_pil_image(((image - least) / (most - least).clamp(min=1e-12)).float().cpu()))
    small = image.convert("RGB")
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return small
