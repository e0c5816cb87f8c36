"""Misclassified test images for the report: predictions that tuning changed, and frequent confusions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..data import SizedDataset

_MAX_SIDE = 128  # of a thumbnail, in pixels


@dataclass(frozen=True)
class ChangedImage:
    """Test image with one correct prediction, before or after tuning, with its class and both predictions."""

    test: str
    image: Image.Image
    label: str
    zero_shot: str
    tuned: str


@dataclass(frozen=True)
class Confusion:
    """Class that is often predicted as another class.

    Attributes:
        test: Name of the test.
        image: Test image of the class, predicted as the other class.
        label: The class.
        predicted: The other class.
        predicted_image: Test image of the other class, if there is one.
        count: Number of images of the class that are predicted as the other class.
        total: Number of test images of the class.
    """

    test: str
    image: Image.Image
    label: str
    predicted: str
    predicted_image: Image.Image | None
    count: int
    total: int


def changed_images(
    test: str,
    images: SizedDataset,
    classes: Sequence[str],
    labels: Tensor | Sequence[int],
    zero_shot: Tensor,
    tuned: Tensor,
    *,
    limit: int = 12,
) -> list[ChangedImage]:
    """Select test images that are predicted correctly either before or after tuning, not both; one per class.

    Args:
        test: Name of the test.
        images: Items (image, label), where image is a PIL image or a tensor [3, H, W].
        classes: Class names by label.
        labels: Labels of the images, [n].
        zero_shot: Predicted classes before tuning, [n].
        tuned: Predicted classes after tuning, [n].
        limit: Maximum number of images; their classes are spread over all labels.

    Example:
        >>> letters = [(Image.new("L", (8, 8)), 0), (Image.new("L", (8, 8)), 1)]
        >>> changed, = changed_images("new", letters, ["a", "b"], [0, 1], torch.tensor([1, 1]), torch.tensor([0, 1]))
        >>> changed.label, changed.zero_shot, changed.tuned
        ('a', 'b', 'a')
    """
    labels = torch.as_tensor(labels)
    changed = ((zero_shot == labels) != (tuned == labels)).nonzero().flatten().tolist()
    first_of = {int(labels[index]): index for index in reversed(changed)}
    found = [first_of[label] for label in sorted(first_of)]
    count = min(limit, len(found))
    chosen = [found[place * len(found) // count] for place in range(count)]
    return [
        ChangedImage(
            test, thumbnail(images[index][0]), *(classes[int(values[index])] for values in (labels, zero_shot, tuned))
        )
        for index in chosen
    ]


def confusions(
    test: str,
    images: SizedDataset,
    classes: Sequence[str],
    labels: Tensor | Sequence[int],
    predictions: Tensor,
    *,
    limit: int = 8,
) -> list[Confusion]:
    """Select the classes with the most errors, each with its most frequent wrong prediction; the lower label in ties.

    Arguments as for `changed_images`, with the predicted classes [n] and the maximum number of classes.

    Example:
        >>> letters = [(Image.new("L", (8, 8)), label) for label in (0, 0, 1)]
        >>> confusion, = confusions("base", letters, ["a", "b"], [0, 0, 1], torch.tensor([0, 1, 1]))
        >>> confusion.label, confusion.predicted, confusion.count, confusion.total
        ('a', 'b', 1, 2)
    """
    true, predicted = torch.as_tensor(labels).tolist(), predictions.tolist()
    errors: dict[int, dict[int, list[int]]] = {}  # indices of images by label and prediction
    for index, (label, prediction) in enumerate(zip(true, predicted, strict=True)):
        if label != prediction:
            errors.setdefault(label, {}).setdefault(prediction, []).append(index)
    total = Counter(true)
    found = []
    for label in sorted(errors, key=lambda label: (-sum(map(len, errors[label].values())), label))[:limit]:
        most = min(errors[label], key=lambda prediction: (-len(errors[label][prediction]), prediction))
        indices = errors[label][most]
        found.append(
            Confusion(
                test,
                thumbnail(images[indices[0]][0]),
                classes[label],
                classes[most],
                thumbnail(images[true.index(most)][0]) if most in total else None,
                count=len(indices),
                total=total[label],
            )
        )
    return found


def thumbnail(image: Any) -> Image.Image:
    """Convert a PIL image or a tensor to RGB, at most 128 pixels a side.

    A tensor is scaled so that its minimum is black and its maximum white.

    >>> thumbnail(Image.new("RGB", (4000, 3000))).size
    (128, 96)
    >>> thumbnail(torch.randn(3, 32, 32)).size
    (32, 32)
    """
    if isinstance(image, Tensor):
        least, most = image.aminmax()
        return thumbnail(to_pil_image(((image - least) / (most - least).clamp(min=1e-12)).float().cpu()))
    small = image.convert("RGB")
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return small
