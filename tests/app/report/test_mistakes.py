"""Selection of images and confusions for the page of a run."""

from __future__ import annotations

import io

import torch
from PIL import Image, ImageChops

from skipkernels.app.report.mistakes import (
    ConfusedPair,
    add_thumbnails,
    changed,
    confused_pairs,
    confusion_matrix,
    encoded,
    most_frequent_errors,
    one_per_class,
    thumbnail,
)
from tests.app.report.pages import image, predictions_of


def test_encoded_image_is_lossless_if_small_and_reduced_if_large():
    for mode in ("1", "L", "P", "RGBA", "CMYK", "LA", "RGB"):
        small, photo = (Image.open(io.BytesIO(encoded(image(size, mode)))) for size in ((32, 24), (300, 400)))
        assert small.format == "PNG" and photo.format == "JPEG" and photo.size == (96, 128)
        assert small.mode == photo.mode == "RGB"
    assert not ImageChops.difference(small, image((32, 24))).getbbox()
    levels = torch.tensor([-2.0, 0.0, 2.0]).expand(3, 1, 3)
    assert list(thumbnail(levels).convert("L").tobytes()) == [0, 127, 255], "of a tensor"


class Counted:
    """Dataset that records which images were opened."""

    def __init__(self, labels):
        self.labels, self.opened = labels, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.opened.append(index)
        return Image.new("L", (4, 4), index % 256), int(self.labels[index])


def test_changed_one_per_class():
    test = predictions_of([0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 0], [0, 0, 0, 0, 2, 2])
    fixed, broken = (one_per_class(test.labels, chosen) for chosen in changed(test))
    assert (fixed, broken) == ([1, 5], [3]) and [int(chosen.sum()) for chosen in changed(test)] == [3, 2]
    labels = list(range(100))
    many = predictions_of(labels, [label + 1 for label in labels], labels)
    assert one_per_class(many.labels, changed(many)[0], limit=4) == [0, 25, 50, 75]
    many.tuned = None
    assert not any(chosen.any() for chosen in changed(many))


def test_confusions_by_number_of_errors():
    #         a a a  b b b b  c c c  d
    labels = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]
    test = predictions_of(labels, labels, [2, 0, 2, 2, 0, 3, 1, 0, 2, 0, 4])
    expected = [
        ConfusedPair(1, 0, index=4, predicted_index=0, count=1, total=4),  # three errors, one per other class
        ConfusedPair(0, 2, index=0, predicted_index=7, count=2, total=3),  # two errors, like 2
        ConfusedPair(2, 0, index=7, predicted_index=0, count=2, total=3),
        ConfusedPair(3, 4, index=10, predicted_index=None, count=1, total=1),
    ]
    assert confused_pairs(test) == expected and confused_pairs(test, limit=2) == expected[:2]
    assert confusion_matrix(test, limit=2) == ([1, 0], [[1, 1, 2], [0, 1, 2]])
    assert confusion_matrix(test)[0] == [0, 1, 2, 3, 4], "all of few classes"
    assert confusion_matrix(test)[1][3:] == [[0, 0, 0, 0, 1, 0], [0] * 6]
    assert most_frequent_errors(test)[1] == (0, 1), "the lower of equally frequent ones"
    right = predictions_of(labels, labels, labels)
    assert confused_pairs(right) == [] and confusion_matrix(right) == ([], [])


def test_thumbnails_open_only_selected_images():
    labels = [label for label in range(50) for _ in range(4)]
    test = predictions_of(labels, labels, [(label + 1) % 50 for label in labels])
    data = Counted(test.labels)
    add_thumbnails(test, data)
    assert len(data.opened) == len(set(data.opened)) == len(test.thumbnails) < 30
