"""Own data that list images with labels: csv: and hf:, and validation images."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from skipkernels.app.data import InputError, TaskOptions, few_shot, load_task, open_source
from skipkernels.app.data.shots import hold_out
from skipkernels.features.identity import dataset_identity
from tests.app.data.pictures import RED, class_of, draw_image, encoded

CLASSES = ["cat", "dog", "owl"]


def task_of(data, transform=None, train_transform=None, **how):
    options = TaskOptions(**{"protocol": "few-shot", "shots": 2, **how})
    return load_task(data, options, transform=transform, train_transform=train_transform)


def fails(data, argument: str | None = "data", **how) -> str:
    with pytest.raises(InputError) as caught:
        open_source(data, **how)
    assert argument is None or caught.value.argument == argument
    return str(caught.value)


# ---- csv ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path) -> Path:
    for label, name in enumerate(CLASSES):
        for number in range(10):
            draw_image(tmp_path / "images" / f"{name}{number}.png", label)
    return tmp_path


def table(folder: Path, header: str, row, delimiter: str = ",") -> str:
    lines = [delimiter.join(row(name, number)) for name in CLASSES for number in range(10)]
    (folder / "table.csv").write_text("\n".join([header.replace(",", delimiter), *lines]) + "\n")
    return f"csv:{folder / 'table.csv'}"


def split_of(number: int) -> str:
    return "test" if number > 7 else "Validation" if number > 5 else "train"


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_csv_with_splits(images, delimiter):
    data = table(
        images,
        "\ufeffNumber,Label,SPLIT,Path",
        lambda name, n: (f"{n}", name, split_of(n), f"images/{name}{n}.png"),
        delimiter,
    )
    source = open_source(data)
    assert source.classes == tuple(CLASSES) and source.prompts[0][0] == "a photo of a cat."
    assert [len(source.images(split)) for split in ("train", "val", "test")] == [18, 6, 6]
    assert all(class_of(image) == label for split in ("train", "test") for image, label in source.images(split))
    task = task_of(data, validation="auto")
    assert len(task.train) == 6 and sorted(task.validation.images.names) == sorted(
        f"images/{name}{number}.png" for name in CLASSES for number in (6, 7)
    )


def test_csv_of_captions_without_splits(images):
    """Absolute paths; each caption is its own prompt."""
    data = table(images, "image,caption", lambda name, n: (f"{images}/images/{name}{n}.png", f'"a {name}, sitting"'))
    source = open_source(data)
    assert source.prompts == (["a cat, sitting", "a dog, sitting", "a owl, sitting"],)
    assert [len(source.images(split)) for split in ("train", "val", "test")] == [15, 6, 9]
    assert source.notes[0].endswith("by a hash of their names: 15 train, 6 val, 9 test.")
    elsewhere = images / "elsewhere"
    elsewhere.mkdir()
    os.rename(images / "table.csv", elsewhere / "table.csv")
    assert "Name a folder of all as `root`" in fails(f"csv:{elsewhere / 'table.csv'}", "root")
    assert open_source(f"csv:{elsewhere / 'table.csv'}", root=images).classes == source.classes


def test_csv_names_missing_table_and_unreadable_image(images):
    (images / "images" / "cat3.png").write_bytes(b"no image")
    data = table(images, "path,label", lambda name, n: (f"images/{name}{n}.png", f"{CLASSES.index(name)}"))
    source = open_source(data)
    assert source.classes == ("0", "1", "2") and "numbers and no names" in source.notes[0]
    with pytest.raises(InputError, match=r"cat3\.png: can't be read as an image \(not JPEG"):
        for split in ("train", "val", "test"):
            list(source.images(split))


# ---- hf ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def rows(hub, count: int, *, names: bool = True, **more):
    labels = [label for label in range(3) for _ in range(count)]
    pictures = [
        Image.new("L" if label == 1 else "RGB", (5, 4), 0 if label == 1 else (RED * label, 9, 9)) for label in labels
    ]
    values = {"image": pictures, "label": labels if names else [CLASSES[label] for label in labels]} | {
        key: [value] * len(labels) for key, value in more.items()
    }
    features = {"image": hub.Image(), "label": hub.ClassLabel(names=CLASSES) if names else hub.Value("string")}
    features |= {key: hub.Value("int64") for key in more}
    return hub.Dataset.from_dict(values, features=hub.Features(features))


def test_hf_folder(hub, tmp_path):
    parts = {"train": rows(hub, 4, row=1), "validation": rows(hub, 1, row=1), "test": rows(hub, 2, row=1)}
    parts["unlabelled"] = rows(hub, 1, row=1)
    hub.DatasetDict(parts).save_to_disk(tmp_path / "set")
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert source.classes == tuple(CLASSES)
    assert [len(source.images(split)) for split in ("train", "val", "test")] == [12, 3, 6]
    assert "the split unlabelled is not used." in source.notes[0]
    test = source.images("test")
    assert [label for _, label in test] == [0, 0, 1, 1, 2, 2] and class_of(test[5][0]) == 2
    assert test[2][0].mode == "RGB", "a grey image"
    first, again, other = (task_of(f"hf:{tmp_path / 'set'}", pil_to_tensor, seed=seed).train for seed in (0, 0, 1))
    assert torch.is_tensor(first[0][0])
    assert dataset_identity(first) == dataset_identity(again) != dataset_identity(other)
    assert "which column has the labels? Got other among image, label, row. Name it by ?label=NAME." in fails(
        f"hf:{tmp_path / 'set'}?label=other"
    )
    assert "which column has the images? Got label among" in fails(f"hf:{tmp_path / 'set'}?image=label")
    assert "options must be image=…" in fails(f"hf:{tmp_path / 'set'}?column=label")


def test_hf_single_dataset_with_text_labels(hub, tmp_path):
    rows(hub, 10, names=False).save_to_disk(tmp_path / "one")
    source = open_source(f"hf:{tmp_path / 'one'}?image=image&label=label")
    assert "Got none among image, label. Name it by ?label=NAME." in fails(f"hf:{tmp_path / 'one'}")
    assert source.classes == tuple(CLASSES) and len(source.images("test")) == 9
    assert "no test images, so the images of each class are split by a hash" in source.notes[0]


def test_hf_uses_own_decoder(hub, tmp_path):
    """16 bits as in files."""
    deep = {"bytes": encoded(Image.fromarray(np.full((4, 5), 40_000, dtype=np.uint16))), "path": None}
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["a", "b"])})
    rows = hub.Dataset.from_dict(
        {"image": [{"bytes": b"none", "path": None}, deep], "label": [0, 1]}, features=features
    )
    hub.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "set")
    images = open_source(f"hf:{tmp_path / 'set'}").images("train")
    assert images[1][0].getpixel((0, 0)) == (156, 156, 156)
    with pytest.raises(InputError, match=r"set: train/0: can't be read as an image \(not JPEG"):
        images[0]


def test_hf_splits_without_labels_are_not_used(hub, tmp_path):
    """The test split comes first, and its images have no labels; an unused column of val has another type."""
    other = rows(hub, 1, row=1).cast_column("row", hub.Value("string"))
    parts = {"test": rows(hub, 2, row=1).remove_columns("label"), "train": rows(hub, 4, row=1), "validation": other}
    hub.DatasetDict(parts).save_to_disk(tmp_path / "set")
    source = open_source(f"hf:{tmp_path / 'set'}")
    assert [len(source.images(split)) for split in ("train", "test")] == [12, 3] and len(list(source.images("test")))
    assert "test does not have the columns image and label, so it is not used." in source.notes[0]


def test_hf_refuses_other_classes_and_absent_labels(hub, tmp_path):
    other = rows(hub, 1).cast_column("label", hub.ClassLabel(names=CLASSES[::-1]))
    hub.DatasetDict({"train": rows(hub, 1), "test": other}).save_to_disk(tmp_path / "other")
    assert "label must have the same classes in each split; those of test differ" in fails(f"hf:{tmp_path / 'other'}")
    absent = rows(hub, 1).remove_columns("label").add_column("label", [0, -1, 1])
    absent.cast_column("label", hub.ClassLabel(names=CLASSES)).save_to_disk(tmp_path / "absent")
    assert "train/1 has no label; label is -1. Add it, or remove" in fails(f"hf:{tmp_path / 'absent'}")
    hub.DatasetDict({"test": hub.load_from_disk(str(tmp_path / "absent"))}).save_to_disk(tmp_path / "test")
    assert "no split has images that all have a label" in fails(f"hf:{tmp_path / 'test'}")


def test_hf_refuses(hub, tmp_path, monkeypatch):
    two = rows(hub, 2).add_column("coarse", [0] * 6).cast_column("coarse", hub.ClassLabel(names=["animal"]))
    two.save_to_disk(tmp_path / "two")
    assert "Got label and coarse among image, label, coarse. Name it by ?label=NAME." in fails(f"hf:{tmp_path / 'two'}")

    two.remove_columns("label").add_column("label", [1.5] * 6).save_to_disk(tmp_path / "floats")
    assert "label must be text or a whole number; got 1.5 for train/0" in fails(f"hf:{tmp_path / 'floats'}?label=label")

    def unreachable(*args, **named):
        assert (args, named) == (("someone/set", "small"), {"revision": None}), "no code of the dataset is trusted"
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(hub, "load_dataset", unreachable)
    assert "hf:someone/set: can't be loaded (ConnectionError: no route)" in fails("hf:someone/set?config=small")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'skipkernels[datasets]'" in fails("hf:someone/set")


# ---- validation --------------------------------------------------------------------------------------------------


def test_hold_out_keeps_the_choice_of_few_shot():
    labels, names = [0] * 20 + [1] * 3 + [2], [f"{index}" for index in range(24)]
    train, held = hold_out(labels, names, 4, 7, 0.2)
    chosen = few_shot(labels, names, 4, 7)
    assert not set(train) & set(held)
    assert [index for index in train if labels[index] == 0] == [index for index in chosen if labels[index] == 0]
    counts = [[sum(labels[index] == label for index in part) for label in range(3)] for part in (train, held)]
    assert counts == [[4, 2, 1], [4, 1, 0]], "of three images that all train one is held out, of one none"
    other = list(range(23, -1, -1))  # the order of the images has no effect
    again = hold_out([labels[i] for i in other], [names[i] for i in other], 4, 7, 0.2)
    assert [[other[index] for index in part] for part in again] == [train, held]


@pytest.mark.parametrize(
    ("validation", "count", "note"),
    [("none", None, None), ("auto", 6, "validation on 6 images of its val split."), ("split", 6, "its val split"),
     (0.4, 9, "validation on 9 images of its train split, which don't train")],  # of seven of each class
)  # fmt: skip
def test_task_validation(images, validation, count, note):
    data = table(images, "path,label", lambda name, n: (f"images/{name}{n}.png", name))
    task = task_of(data, validation=validation, transform=lambda image: "test", train_transform=lambda image: "train")
    assert len(task.train) == 6 and task.train[0][0] == "train"
    if count is None:
        assert task.validation is None
        return
    assert len(task.validation.images) == count and task.validation.images[0][0] == "test"
    assert task.validation.classes == CLASSES and any(note in each for each in task.notes)
    parts = [set(part.names) for part in (task.train, task.validation.images, task.tests[0].images)]
    assert len(set.union(*parts)) == sum(map(len, parts)), "no image is in two parts"
