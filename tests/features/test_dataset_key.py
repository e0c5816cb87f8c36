"""Identification of datasets: what the key and the sampled images notice, and what they do not."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import CLASSES, Drawn, build, images, pictures, skip_clip
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import skipkernels as sk
from skipkernels.app.data import DatasetImages, LabelledImages
from skipkernels.digests import digest_json
from skipkernels.features.dataset_key import dataset_key, sample_images
from skipkernels.store import StoreError

LONG_AGO = 1_000_000_000_000_000_000  # ns; a file written now has another time
COUNT = 40  # images, of which 0, 3, 9, 24, 28, 34 and 39 are sampled, among others
NAMES = ("cat/a", "cat/b", "dog/a", "dog/b")


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes of two image files each, with an old modification time."""
    for value, name in enumerate(NAMES):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)
        os.utime(path, ns=(LONG_AGO, LONG_AGO))
    return tmp_path / "images"


class Named(Dataset):
    """Files by names relative to `root`, as a user may write it."""

    def __init__(self, root: Path):
        self.root, self.names, self.targets = root, [f"{name}.png" for name in NAMES], torch.tensor([0, 0, 1, 1])

    def __len__(self) -> int:
        return 4


class Private(Dataset):
    """Files and labels in the private attributes of torchvision's Flowers102."""

    def __init__(self, root: Path):
        self._image_files, self._labels = [root / f"{name}.png" for name in NAMES], [0, 0, 1, 1]

    def __len__(self) -> int:
        return 4


FILES: dict[str, Callable[[Path], Any]] = {
    "ImageFolder": lambda root: ImageFolder(str(root)),
    "LabelledImages": lambda root: LabelledImages(root, [f"{name}.png" for name in NAMES], [0, 0, 1, 1]),
    "DatasetImages": lambda root: DatasetImages(ImageFolder(str(root))),
    "Subset": lambda root: Subset(ImageFolder(str(root)), range(4)),
    "ConcatDataset": lambda root: ConcatDataset([Subset(ImageFolder(str(root)), [0, 1]), Subset(Named(root), [2, 3])]),
    "names": Named,
    "private": Private,
}


def differences(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_dataset_key_of_files(root, make):
    before = dataset_key(make(root))
    assert all(len(before[name]) == 32 for name in ("images", "labels")), "digests"
    assert before == dataset_key(make(root)) == dataset_key(make(root)) | {"dataset key": "not given"}
    os.utime(root / "dog" / "b.png")
    assert differences(before, dataset_key(make(root))) == {"images"}


def renamed(root: Path) -> None:
    (root / "cat" / "b.png").rename(root / "cat" / "c.png")


def grown(root: Path) -> None:
    with (root / "dog" / "b.png").open("ab") as file:
        file.write(b"more")
    os.utime(root / "dog" / "b.png", ns=(LONG_AGO, LONG_AGO))


def removed(root: Path) -> None:
    (root / "dog" / "b.png").unlink()


def relabelled(root: Path) -> None:
    (root / "dog" / "b.png").rename(root / "cat" / "d.png")


def same_size_and_time(root: Path) -> None:
    path = root / "dog" / "b.png"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (renamed, {"images"}),
        (grown, {"images"}),
        (removed, {"images", "labels"}),
        (relabelled, {"images", "labels"}),
        (same_size_and_time, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_dataset_key_notices_changes_of_files(root, change, noticed):
    before = dataset_key(ImageFolder(str(root)))
    change(root)
    assert differences(before, dataset_key(ImageFolder(str(root)))) == noticed


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_dataset_key_is_kept_when_the_folder_moves(root, tmp_path, make, monkeypatch):
    before = dataset_key(make(root))
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "pictures")  # keeps modification times
    assert dataset_key(make(moved)) == before
    monkeypatch.chdir(tmp_path)
    for relative in ("images", "./images", "elsewhere/../images"):
        assert dataset_key(make(Path(relative))) == before


@pytest.mark.parametrize("indices", [[0, 1], [1, 0]])
def test_dataset_key_of_subsets(root, indices):
    for dataset in (ImageFolder(str(root)), TensorDataset(pictures(4), torch.zeros(4)), DatasetImages([(0, 0)] * 4)):
        keys = [dataset_key(Subset(dataset, indices)), dataset_key(Subset(dataset, [0, 3]))]
        assert "images" in differences(*keys)


# ---- labels, transforms, key -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda labels: TensorDataset(pictures(4), torch.tensor(labels)),
        lambda labels: list(zip(pictures(4), labels, strict=True)),
        lambda labels: DatasetImages([(0, 0)] * 4, labels=labels),
        lambda labels: ConcatDataset(
            [TensorDataset(pictures(2), torch.tensor(part)) for part in (labels[:2], labels[2:])]
        ),
    ],
    ids=["tensors", "list", "picked", "concatenated"],
)
def test_dataset_key_notices_labels(make):
    assert differences(dataset_key(make([0, 1, 2, 3])), dataset_key(make([0, 1, 2, 2]))) == {"labels"}
    assert dataset_key(make([0, 1, 2, 3])) == dataset_key(make([0, 1, 2, 3]))


def darker(image: Any, by: float = 0.5) -> Any:
    return image * by


TRANSFORMS = {
    "mean, v2": (v2.Normalize([0.5], [0.2]), v2.Normalize([0.4], [0.2])),
    "order": (v1.Compose([v1.Resize(6), v1.CenterCrop(4)]), v1.Compose([v1.CenterCrop(4), v1.Resize(6)])),
    "function": (darker, images),
}


@pytest.mark.parametrize("pair", TRANSFORMS.values(), ids=TRANSFORMS)
def test_dataset_key_notices_transforms(root, pair):
    for make in (FILES["ImageFolder"], FILES["LabelledImages"]):
        keys = []
        for transform in pair:
            dataset = make(root)
            dataset.transform = transform
            keys.append(dataset_key(Subset(dataset, [0, 1])))
        assert differences(*keys) == {"image transform"}
    assert " at 0x" in repr(darker), "addresses are not part of the key"


def test_key_argument(tmp_path):
    clip = skip_clip()
    build(tmp_path, images(9), clip, key={"name": "noise", "version": 1})
    sk.FeatureCache.open(tmp_path, clip, images(9, seed=1), key={"version": 1, "name": "noise"})
    message = r"dataset key \({.*1} there, {.*2} here\)\. Pass the same `key`"
    with pytest.raises(StoreError, match=message):
        sk.FeatureCache.open(tmp_path, dataset=images(9), key={"name": "noise", "version": 2})
    with pytest.raises(StoreError, match=r"number of images \(9 there, 8 here\)"):
        sk.FeatureCache.open(tmp_path, dataset=images(8), key={"name": "noise", "version": 1})
    for key in (object(), float("nan")):
        with pytest.raises(ValueError, match="^FeatureCache: key must be text or a JSON value; got "):
            build(tmp_path / "other", images(9), clip, key=key)
    assert not (tmp_path / "other").exists()


# ---- sampled images ----------------------------------------------------------------------------------------------


class Numbered(Dataset):
    """Images by number, of which some are changed by a private attribute."""

    def __init__(self, off: torch.Tensor | float = 0.0, items: tuple[int, ...] = tuple(range(COUNT))):
        self.pictures, self._off, self._items = pictures(COUNT), off, items

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image = self.pictures[item]
        return image + self._off if item in self._items else image, item % CLASSES


class Transformed(Numbered):
    def __init__(self, transform: Callable):
        super().__init__()
        self.transform = transform

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image, label = super().__getitem__(item)
        return self.transform(image), label


LAMBDAS = (lambda image: image, lambda image: image.flip(-1))

# Datasets before and after a change that their key does not notice.
UNLISTED: dict[str, Callable[[bool], Any]] = {
    "private attribute": lambda change: Numbered(0.5 * change),
    "lambda": lambda change: Transformed(v1.Lambda(LAMBDAS[change])),
}


@pytest.mark.parametrize("make", UNLISTED.values(), ids=UNLISTED)
def test_sampled_images_notice_what_the_key_does_not(tmp_path, make):
    store, clip, before = tmp_path / "store", skip_clip(), make(False)
    key = dataset_key(before)
    build(store, before, clip)
    sk.FeatureCache.open(store, clip, make(False))
    build(store, make(False), clip, resume=True)
    after = make(True)
    assert dataset_key(after) == key, "otherwise this case tests the key"
    message = r"item \d+ of the dataset has another image or label than when the cache was built.* `overwrite=True`"
    with pytest.raises(StoreError, match=message):
        sk.FeatureCache.open(store, clip, after)
    with pytest.raises(StoreError, match=message):
        build(store, after, clip, resume=True)


def test_sample_images_are_the_first_the_last_and_six_others(tmp_path):
    sampled = [sample["item"] for sample in sample_images(Numbered(), seed=0)]
    assert len(sampled) == 8 and sampled[0] == 0 and sampled[-1] == COUNT - 1
    assert max(b - a for a, b in zip(sampled, sampled[1:], strict=False)) <= COUNT / 4, "spread over the dataset"
    assert len(sample_images(images(3), seed=0)) == 3
    build(tmp_path, Numbered())
    for item in (0, sampled[3], COUNT - 1):
        with pytest.raises(StoreError, match=f"^{tmp_path}: item {item} of the dataset has another image or label"):
            sk.FeatureCache.open(tmp_path, dataset=Numbered(0.5, (item,)))
    others = tuple(set(range(COUNT)) - set(sampled))
    sk.FeatureCache.open(tmp_path, dataset=Numbered(0.5, others))  # not noticed, as docs/cache.md says


def test_sampled_images_may_be_decoded_slightly_differently(tmp_path):
    build(tmp_path, Numbered())
    unit = (torch.randint(-1, 2, (3, 16, 16), generator=torch.Generator().manual_seed(0))) / 255
    sk.FeatureCache.open(tmp_path, dataset=Numbered(unit))


def test_sample_images_draw_random_transforms_reproducibly(tmp_path):
    dataset = Drawn(8)
    build(tmp_path, dataset, views=2, seed=3, workers=1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for _ in range(2):
        sk.FeatureCache.open(tmp_path, dataset=dataset)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert before[0].equal(after[0]) and before[1:] == after[1:]


class Irreproducible(Numbered):
    """Draws from its own generator."""

    def __init__(self):
        super().__init__()
        self._random = random.Random(0)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image, label = super().__getitem__(item)
        return image + self._random.random(), label


def test_irreproducible_images_need_a_key(tmp_path):
    with pytest.raises(StoreError, match="item 0 of the dataset differs each time it is loaded.* pass `key`"):
        build(tmp_path, Irreproducible())
    assert not list(tmp_path.iterdir())
    build(tmp_path, Irreproducible(), key="irreproducible")
    sk.FeatureCache.open(tmp_path, dataset=Irreproducible(), key="irreproducible")


@pytest.mark.parametrize("samples", [None, [{}] * 8], ids=["none", "without item"])
def test_store_without_samples_is_refused(tmp_path, samples):
    build(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["layout"]["notes"]["samples"] = samples
    del manifest["xxh3"]
    manifest["xxh3"] = digest_json(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    sk.FeatureCache.open(tmp_path, skip_clip())
    with pytest.raises(StoreError, match="its manifest has no samples that fit this dataset. Build another cache"):
        sk.FeatureCache.open(tmp_path, dataset=images())


def test_fingerprint_of_a_dataset_without_files():
    dataset = TensorDataset(torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))
    keys = []
    for fingerprint in ("first", "second"):
        dataset.fingerprint = fingerprint
        keys.append(dataset_key(dataset)["images"])
    assert keys[0] != keys[1]
