"""Datasets of Hugging Face, hf:."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from skipkernels.app.data import InputError, TaskOptions, load_task, open_source
from skipkernels.features.identity import dataset_identity
from tests.app.data.pictures import RED, class_of, encoded, raises_input_error

CLASSES = ["cat", "dog", "owl"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The package `datasets`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


def rows(hub, count: int, *, names: bool = True):
    """Dataset with `count` images of each class, those of dogs in grey; without `names`, its labels are text."""
    labels = [label for label in range(3) for _ in range(count)]
    pictures = [Image.new("RGB", (5, 4), (RED * label, 9, 9)) for label in labels]
    pictures[count : 2 * count] = [Image.new("L", (5, 4))] * count
    values = {"image": pictures, "label": labels if names else [CLASSES[label] for label in labels]}
    features = {"image": hub.Image(), "label": hub.ClassLabel(names=CLASSES) if names else hub.Value("string")}
    return hub.Dataset.from_dict(values, features=hub.Features(features))


@pytest.fixture
def saved(hub, tmp_path):
    """Function that saves a dataset, or several by split, and returns its name."""

    def save(dataset, folder: str = "set") -> str:
        (hub.DatasetDict(dataset) if isinstance(dataset, dict) else dataset).save_to_disk(tmp_path / folder)
        return f"hf:{tmp_path / folder}"

    return save


def test_hf_splits(hub, saved):
    parts = {"train": rows(hub, 4), "validation": rows(hub, 1), "test": rows(hub, 2), "unlabelled": rows(hub, 1)}
    source = open_source(saved(parts))
    assert source.classes == tuple(CLASSES)
    assert [len(source.images(split)) for split in ("train", "val", "test")] == [12, 3, 6]
    assert "the split unlabelled is not used." in source.notes[0]
    test = source.images("test")
    assert [label for _, label in test] == [0, 0, 1, 1, 2, 2] and class_of(test[5][0]) == 2
    assert test[2][0].mode == "RGB", "a grey image"


def test_hf_identity_depends_on_the_dataset_and_the_chosen_rows(hub, saved):
    def identity(data: str, seed: int) -> str:
        options = TaskOptions(protocol="few-shot", shots=2, seed=seed)
        return dataset_identity(load_task(data, options).train)["images"]

    data = saved({"train": rows(hub, 4), "test": rows(hub, 2)})
    other = saved({"train": rows(hub, 4).select([1, 0, *range(2, 12)]), "test": rows(hub, 2)}, "other")
    assert identity(data, 0) == identity(data, 0)
    assert len({identity(data, 0), identity(data, 1), identity(other, 0)}) == 3


def test_hf_single_dataset_with_text_labels(hub, saved):
    source = open_source(saved(rows(hub, 10, names=False)) + "?image=image&label=label")
    assert source.classes == tuple(CLASSES) and len(source.images("test")) == 9
    assert "no test images, so the images of each class are split by a hash" in source.notes[0]


def test_hf_uses_own_decoder(hub, saved):
    """16 bits as in files."""
    deep = {"bytes": encoded(Image.fromarray(np.full((4, 5), 40_000, dtype=np.uint16))), "path": None}
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["a", "b"])})
    of_bytes = {"image": [{"bytes": b"none", "path": None}, deep], "label": [0, 1]}
    two = hub.Dataset.from_dict(of_bytes, features=features)
    images = open_source(saved({"train": two, "test": two})).images("train")
    assert images[1][0].getpixel((0, 0)) == (156, 156, 156)
    with pytest.raises(InputError, match=r"set: train/0: can't be read as an image \(not JPEG"):
        images[0]


def test_hf_splits_without_labels_are_not_used(hub, saved):
    """The test split comes first, and its images have no labels; an unused column of val has another type."""
    parts = {
        "test": rows(hub, 2).remove_columns("label").add_column("row", [1] * 6),
        "train": rows(hub, 4).add_column("row", [1] * 12),
        "validation": rows(hub, 1).add_column("row", ["1"] * 3),
    }
    source = open_source(saved(parts))
    assert [len(source.images(split)) for split in ("train", "test")] == [12, 3] and len(list(source.images("test")))
    assert "test does not have the columns image and label, so it is not used." in source.notes[0]


def with_labels(hub, values: list):
    """Dataset with other labels, of the same classes."""
    changed = rows(hub, 1).remove_columns("label").add_column("label", values)
    return changed.cast_column("label", hub.ClassLabel(names=CLASSES))


def with_coarse(hub):
    changed = rows(hub, 1).add_column("coarse", [0] * 3)
    return changed.cast_column("coarse", hub.ClassLabel(names=["animal"]))


def with_reversed_classes(hub):
    return rows(hub, 1).cast_column("label", hub.ClassLabel(names=CLASSES[::-1]))


# The dataset, options, and words of the error.
REFUSED = [
    (lambda hub: rows(hub, 1), "?column=label", "options must be image=…"),
    (lambda hub: rows(hub, 1), "?image=label", "which column has the images? Got label among image, label."),
    (lambda hub: rows(hub, 1), "?label=other",
     "which column has the labels? Got other among image, label. Name it by ?label=NAME."),
    (lambda hub: rows(hub, 1, names=False), "", "Got none among image, label. Name it by ?label=NAME."),
    (with_coarse, "", "Got label and coarse among image, label, coarse. Name it by ?label=NAME."),
    (lambda hub: rows(hub, 1).remove_columns("label").add_column("label", [1.5] * 3), "?label=label",
     "label must be text or a whole number; got 1.5 for train/0"),
    (lambda hub: {"train": rows(hub, 1), "test": with_reversed_classes(hub)}, "",
     "label must have the same classes in each split; those of test differ"),
    (lambda hub: with_labels(hub, [0, -1, 1]), "",
     "train/1 has no label; label is -1. Add it, or remove"),
    (lambda hub: {"test": with_labels(hub, [0, -1, 1])}, "", "no split has images that all have a label"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_hf_refuses(hub, saved, make, options, words):
    data = saved(make(hub)) + options
    with raises_input_error(words, argument="data"):
        open_source(data)


def test_hf_without_network_and_without_datasets(hub, monkeypatch):
    def unreachable(*args, **named):
        assert (args, named) == (("someone/set", "small"), {"revision": None}), "no code of the dataset is trusted"
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(hub, "load_dataset", unreachable)
    with raises_input_error("hf:someone/set: can't be loaded (ConnectionError: no route)"):
        open_source("hf:someone/set?config=small")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with raises_input_error("pip install 'skipkernels[datasets]'"):
        open_source("hf:someone/set")
