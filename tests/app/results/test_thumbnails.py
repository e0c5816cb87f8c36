"""Thumbnails of the images that a report shows."""

from __future__ import annotations

import io

import torch
from PIL import Image, ImageChops

from skipkernels.app.data.images import Images
from skipkernels.app.data.tasks import TestSet
from skipkernels.app.results.thumbnails import one_per_class, predictions_with_thumbnails, thumbnail
from tests.app.data.pictures import Listed
from tests.app.report.pages import image, predictions_of, top


def opened(picture) -> Image.Image:
    return Image.open(io.BytesIO(thumbnail(picture)))


def test_thumbnail_is_lossless_if_small_and_reduced_if_large():
    for mode in ("1", "L", "P", "RGBA", "CMYK", "LA", "RGB"):
        small, photo = (opened(image(size, mode)) for size in ((32, 24), (300, 400)))
        assert small.format == "PNG" and photo.format == "JPEG" and photo.size == (96, 128)
        assert small.mode == photo.mode == "RGB"
    assert not ImageChops.difference(small, image((32, 24))).getbbox()
    levels = torch.tensor([-2.0, 0.0, 2.0]).expand(3, 1, 3)
    assert list(opened(levels).convert("L").tobytes()) == [0, 127, 255], "of a tensor"


def test_changed_one_per_class():
    test = predictions_of([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 2, 2])
    assert test.fixed().nonzero().flatten().tolist() == [1, 2, 5] and one_per_class(test.labels, test.fixed()) == [1, 5]
    assert test.broken().nonzero().flatten().tolist() == [3, 4] and one_per_class(test.labels, test.broken()) == [3]
    labels = list(range(100))
    many = predictions_of(labels, [label + 1 for label in labels], labels)
    assert one_per_class(many.labels, many.fixed(), limit=4) == [0, 25, 50, 75]
    many.tuned = None
    assert not many.fixed().any() and not many.broken().any()


def test_thumbnails_open_only_the_images_that_are_shown():
    """Images that tuning fixed, one of each class, evenly spaced, without their transform."""
    data = Listed(range(50), lambda label: Image.new("L", (4, 4), label), labels=list(range(50)))
    images = Images(data, transform=lambda picture: 1 / 0)
    wrong, right = [(label + 1) % 50 for label in range(50)], list(range(50))
    test = TestSet("all", list(map(str, range(50))), ("{}",), images)
    found = predictions_with_thumbnails(test, torch.tensor(data.labels), top(*wrong), top(*right))
    assert data.loaded == list(found.thumbnails) == [place * 50 // 8 for place in range(8)]
    assert found.images == list(map(str, range(50)))
