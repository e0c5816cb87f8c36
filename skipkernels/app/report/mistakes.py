"""Mistakes of a run on its test images: changes by tuning, frequent errors, and thumbnails of the images shown."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

from torch import Tensor

from ..data.tasks import TestSet
from ..results.predictions import TestPredictions, TopClasses

GALLERY = 8
"""Largest number of images in a gallery."""
_MAX_SIDE = 128  # longer side of a thumbnail, in pixels
_PIXEL_ART = 64  # images up to this size are stored without loss


def fixed(test: TestPredictions) -> Tensor:
    """Mask [n] of the images that only the tuned model classifies correctly."""
    return (test.zero_shot.classes[:, 0] != test.labels) & (test.last.classes[:, 0] == test.labels)


def broken(test: TestPredictions) -> Tensor:
    """Mask [n] of the images that only the model before tuning classifies correctly."""
    return (test.zero_shot.classes[:, 0] == test.labels) & (test.last.classes[:, 0] != test.labels)


def one_per_class(labels: Tensor, chosen: Tensor, limit: int = GALLERY) -> list[int]:
    """Indices of at most `limit` of the chosen images, of different classes, evenly spaced."""
    first_of = {int(labels[index]): index for index in reversed(chosen.nonzero().flatten().tolist())}
    found = [first_of[label] for label in sorted(first_of)]
    count = min(limit, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def most_frequent_errors(test: TestPredictions) -> dict[int, tuple[int, int]]:
    """Most frequent wrong prediction and its number of images, by label; the lower class of equally frequent ones."""
    predicted = test.last.classes[:, 0]
    wrong = predicted != test.labels
    pairs = Counter(zip(test.labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    most: dict[int, tuple[int, int]] = {}
    for (label, other), count in sorted(pairs.items()):
        if count > most.get(label, (0, 0))[1]:
            most[label] = other, count
    return most


def predictions_with_thumbnails(
    test: TestSet, labels: Tensor, zero_shot: TopClasses, tuned: TopClasses | None
) -> TestPredictions:
    """Collect the predictions for a test, and read the images that the report shows, without their transform."""
    found = TestPredictions(test.name, list(test.classes), labels, zero_shot, tuned, list(test.images.names))
    images = test.images.with_transform(None)
    shown = [*one_per_class(labels, fixed(found)), *one_per_class(labels, broken(found))]
    found.thumbnails = {index: thumbnail(images[index][0]) for index in shown}
    return found


def thumbnail(image: Any) -> bytes:
    """Return a small copy of an image as a file: PNG up to 64 pixels a side, else JPEG.

    `image` is one of Pillow, or a tensor [3, H, W], scaled to its range.
    """
    if isinstance(image, Tensor):
        from torchvision.transforms.functional import to_pil_image

        least, most = image.aminmax()
        image = to_pil_image(((image - least) / (most - least).clamp(min=1e-12)).float().cpu())
    small, buffer = image.convert("RGB"), io.BytesIO()
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    small.save(buffer, "png" if max(small.size) <= _PIXEL_ART else "jpeg", quality=80)
    return buffer.getvalue()
