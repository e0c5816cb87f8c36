"""Predictions for a test with thumbnails of the images that the report shows: of those that tuning fixed or broke."""

from __future__ import annotations

import io
from typing import Any

from torch import Tensor

from ..data.tasks import TestSet
from .predictions import TestPredictions, TopClasses

GALLERY = 8
"""Largest number of images in a gallery."""
_MAX_SIDE = 128  # longer side of a thumbnail, in pixels
_PIXEL_ART = 64  # images up to this size are stored without loss


def predictions_with_thumbnails(
    test: TestSet, labels: Tensor, zero_shot: TopClasses, tuned: TopClasses | None
) -> TestPredictions:
    """Collect the predictions for a test, and read the images that the report shows, without their transform."""
    found = TestPredictions(test.name, list(test.classes), labels, zero_shot, tuned, list(test.images.names))
    images = test.images.with_transform(None)
    shown = [*one_per_class(labels, found.fixed()), *one_per_class(labels, found.broken())]
    found.thumbnails = {index: thumbnail(images[index][0]) for index in shown}
    return found


def one_per_class(labels: Tensor, chosen: Tensor, limit: int = GALLERY) -> list[int]:
    """Indices of at most `limit` of the chosen images, of different classes, evenly spaced."""
    first_of = {int(labels[index]): index for index in reversed(chosen.nonzero().flatten().tolist())}
    found = [first_of[label] for label in sorted(first_of)]
    count = min(limit, len(found))
    return [found[place * len(found) // count] for place in range(count)]


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
