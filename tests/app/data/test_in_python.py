"""Sources of map-style datasets that are passed in Python."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from PIL import Image

from skipkernels.app.data import from_datasets
from tests.app.data.pictures import Listed


def squares(own, **attributes) -> Listed:
    return Listed(own, lambda label: Image.new("L", (4, 4), 50 * label), **attributes)


def test_prompts_use_normalized_class_names():
    source = from_datasets("a", test=[("image", 0)], classes=[" {x}__y\t z "], templates=["a {}.", "{}"])
    assert source.prompts == (["a {x} y z."], ["{x} y z"])


def test_from_datasets_classes_images_and_labels():
    source = from_datasets("squares", train=squares([0, 1, 1, 0, 1]), test=squares([1, 0]), classes=["black", "grey"])
    assert source.prompts == (["a photo of a black.", "a photo of a grey."],) and source.name == "squares"
    images = source.images("test", transform=lambda image: image.getpixel((0, 0)))
    assert [images[0], images[1]] == [((50, 50, 50), 1), ((0, 0, 0), 0)]
    assert source.subset_classes([1]).images("train").labels == [0, 0, 0]


def test_from_datasets_takes_attributes_of_the_dataset():
    dataset = squares([0, 1], classes=("black", "grey"), names=["a", "b"], targets=torch.tensor([0, 1]))
    source = from_datasets("squares", train=dataset)
    assert source.classes == ("black", "grey")
    assert (source.images("train").labels, source.images("train").names) == ([0, 1], ["a", "b"])
    assert not dataset.loaded


def test_from_datasets_takes_names_of_a_feature():
    """Such a dataset of Hugging Face has no attribute with its classes."""
    label = SimpleNamespace(names=["black", "grey"])
    dataset = squares([0, 1], classes=None, features={"label": label})
    assert from_datasets("squares", train=dataset).classes == ("black", "grey")


def test_from_datasets_ignores_a_method_names():
    dataset = squares([0, 1], classes=["black", "grey"], names=lambda: "a method")
    assert from_datasets("squares", train=dataset).images("train").names == ["0", "1"]
