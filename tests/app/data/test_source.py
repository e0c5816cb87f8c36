"""Sources: by name, and of map-style datasets."""

from __future__ import annotations

import torch
from PIL import Image

from skipkernels.app.data import TaskOptions, from_datasets, load_task
from tests.app.data.pictures import Listed

# ---- by name ---------------------------------------------------------------------------------------------------------


def test_prompts_use_normalized_class_names():
    source = from_datasets("a", test=[("image", 0)], classes=[" {x}__y\t z "], templates=["a {}.", "{}"])
    assert source.prompts == (["a {x} y z."], ["{x} y z"])


# ---- from_datasets ---------------------------------------------------------------------------------------------------


def squares(own, **attributes) -> Listed:
    return Listed(own, lambda label: Image.new("L", (4, 4), 50 * label), **attributes)


def test_from_datasets():
    source = from_datasets("squares", train=squares([0, 1, 1, 0, 1]), test=squares([1, 0]), classes=["black", "grey"])
    assert source.prompts == (["a photo of a black.", "a photo of a grey."],) and source.name == "squares"
    images = source.images("test", transform=lambda image: image.getpixel((0, 0)))
    assert [images[0], images[1]] == [((50, 50, 50), 1), ((0, 0, 0), 0)]
    few = load_task(source, TaskOptions(protocol="few-shot", shots=2)).train
    assert [(image.getpixel((0, 0)), label) for image, label in few] == [((0, 0, 0), 0)] * 2 + [((50, 50, 50), 1)] * 2
    assert source.subset_classes([1]).images("train").labels == [0, 0, 0]


def test_from_datasets_optional_attributes():
    names = ["a", "b", "c", "d"]
    there = squares([0, 0, 0, 1], labels=[0, 0, 0, 1], classes=["black", "grey"], names=names)
    turned = squares([1, 0, 0, 0], targets=torch.tensor([1, 0, 0, 0]), classes=("black", "grey"), names=names[::-1])
    sources = [from_datasets("squares", train=dataset) for dataset in (there, turned)]
    assert sources[0].classes == sources[1].classes == ("black", "grey")
    chosen = [load_task(source, TaskOptions(protocol="few-shot", shots=2, seed=5, test="none")) for source in sources]
    assert chosen[0].train.names == chosen[1].train.names
    without = squares([0, 0, 0, 1], classes=["black", "grey"], names=lambda: "a method")
    assert from_datasets("squares", train=without).images("train").names == ["0", "1", "2", "3"]
