"""Datasets of torchvision, in torchvision's layouts and read by its code."""

from __future__ import annotations

import struct

import pytest
from pictures import class_of, draw_image, raises_input_error, shuffle_listings
from torchvision import datasets

from skipkernels.app.data import LabelledImages, open_source
from skipkernels.app.data.templates import COOP, PAPER
from skipkernels.app.data.torchvision_sets import DATASETS
from skipkernels.features.identity import dataset_identity

# ---- files as torchvision downloads them -----------------------------------------------------------------------------


def dtd(root, patch):
    folder = root / "dtd/dtd"
    (folder / "labels").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        lines = []
        for label, name in enumerate(("banded", "polka-dotted")):
            for image in range(2):
                draw_image(folder / "images" / name / f"{name}_{number}{image}.jpg", label)
                lines.append(f"{name}/{name}_{number}{image}.jpg\n")
        (folder / f"labels/{split}1.txt").write_text("".join(lines))


def eurosat(root, patch):
    for label, name in enumerate(("AnnualCrop", "Forest", "SeaLake")):
        for image in range(10):
            draw_image(root / "eurosat/2750" / name / f"{name}_{image}.jpg", label)


def imagenette(root, patch):
    for split in ("train", "val"):
        for label, wnid in enumerate(("n01440764", "n02979186")):
            draw_image(root / "imagenette2" / split / wnid / f"{wnid}_1.JPEG", label)


def oxfordiiitpet(root, patch):
    folder = root / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    for number, split in enumerate(("trainval", "test")):
        lines = []
        for label, name in enumerate(("Abyssinian", "american_bulldog")):
            draw_image(folder / "images" / f"{name}_{number}.jpg", label)
            lines.append(f"{name}_{number} {label + 1} 1 1\n")
        (folder / f"annotations/{split}.txt").write_text("".join(lines))


def sun397(root, patch):
    folder = root / "SUN397"
    for label, place in enumerate(("a/abbey", "a/apartment_building/outdoor")):
        for image in range(10):
            draw_image(folder / place / f"sun_a{image}.jpg", label)
    (folder / "ClassName.txt").write_text("/a/abbey\n/a/apartment_building/outdoor\n")


def mnist(root, patch):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    labels = bytes(label for label in range(10) for _ in range(3))
    images = b"".join(bytes([20 * label]) * 28 * 28 for label in labels)  # as `draw_image` draws them
    for name in ("train", "t10k"):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 30, 28, 28) + images)
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 30) + labels)


WRITERS = {
    "dtd": dtd,
    "eurosat": eurosat,
    "imagenette": imagenette,
    "mnist": mnist,
    "oxfordiiitpet": oxfordiiitpet,
    "sun397": sun397,
}
# The first class names, and the number of images in train, val and test.
WANTED = {
    "dtd": (["banded", "polka-dotted"], 4, 4, 4),
    "eurosat": (["Annual Crop Land", "Forest", "Sea or Lake"], 15, 6, 9),
    "imagenette": (["tench", "cassette player"], 2, None, 2),
    "mnist": (["zero", "one"], 30, None, 30),
    "oxfordiiitpet": (["Abyssinian", "American Bulldog"], 2, None, 2),
    "sun397": (["abbey", "outdoor apartment building"], 10, 4, 6),
}


def red(image):
    return class_of(image.convert("RGB"))


@pytest.mark.parametrize("name", WRITERS)
def test_open_torchvision(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path, monkeypatch)
    names, *sizes = WANTED[name]
    source = open_source(f"torchvision:{name}", tmp_path)
    assert list(source.classes[: len(names)]) == names and source.name == f"torchvision:{name}"
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        if size is None:
            with raises_input_error(f"torchvision:{name} has no {split} images: it has train, test images"):
                source.images(split)
            continue
        images = source.images(split)
        assert len(images) == size == len(set(images.names))
        of_files = name != "mnist"
        assert isinstance(images, LabelledImages) == of_files, "labels are known without loading images"
        assert [(red(images[index][0]), images[index][1]) for index in range(size)] == [
            (label, label) for label in images.labels
        ]
    few = source.subset_classes(range(len(names))).few_shot(1, seed=0)
    assert few.labels == list(range(len(names)))
    assert dataset_identity(few) != dataset_identity(source.images("test")), "different for a feature cache"


@pytest.mark.parametrize("name", [name for name in WRITERS if DATASETS[name].coop])
def test_open_torchvision_templates(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path, monkeypatch)
    for chosen, templates in (("paper", PAPER), ("coop", COOP)):
        assert open_source(f"torchvision:{name}", tmp_path, chosen).templates == (templates[DATASETS[name].coop],)


@pytest.mark.parametrize("name", ["eurosat", "sun397", "dtd"])
def test_open_torchvision_ignores_listing_order(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path, monkeypatch)

    def found():
        source = open_source(f"torchvision:{name}", tmp_path)
        return [source.images("test").names, source.few_shot(2, seed=1).names]

    before = found()
    for seed in range(3):
        with monkeypatch.context() as patch:
            shuffle_listings(patch, seed)
            assert found() == before


@pytest.mark.parametrize("name", DATASETS)
def test_open_torchvision_missing_dataset(tmp_path, name):
    with raises_input_error(f"torchvision:{name}: not usable in {tmp_path}", "`download=True`", argument="root"):
        open_source(f"torchvision:{name}", tmp_path)


def test_open_torchvision_download(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("Temporary failure\nin name resolution")

    monkeypatch.setattr(datasets.EuroSAT, "download", fail)
    words = "torchvision:eurosat: not usable in", "failure in name", "Is the network available"
    with raises_input_error(*words, argument="root"):
        open_source("torchvision:eurosat", tmp_path, download=True)
    monkeypatch.setattr(datasets.EuroSAT, "download", lambda self: eurosat(tmp_path, monkeypatch))
    source = open_source("torchvision:EuroSAT", tmp_path, download=True)
    assert len(source.images("test")) == 9 and "split by a hash of their paths" in source.notes[0]


def test_open_torchvision_unknown_dataset_or_root(tmp_path):
    with raises_input_error("no dataset 'imagenet' of torchvision", *DATASETS, argument="data"):
        open_source("torchvision:imagenet", tmp_path)
    with raises_input_error("torchvision:mnist needs the folder", argument="root"):
        open_source("torchvision:mnist")
