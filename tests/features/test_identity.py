"""Identity of datasets: the changes that it notices, and those that it does not."""

from __future__ import annotations

import functools
import ntpath
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import skipkernels as sk
from skipkernels.app.data.images import Images
from skipkernels.features import CacheError
from skipkernels.features import identity as identity_module
from skipkernels.features.identity import dataset_identity
from tests.features.caches import build, images, pictures, skip_clip

LONG_AGO = 1_000_000_000_000_000_000  # ns; a file written now has another time
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


class Listed(Dataset):
    """Files in `paths`, as a user may write it."""

    def __init__(self, root: Path):
        self.paths, self.targets = np.array([str(root / f"{name}.png") for name in NAMES]), torch.tensor([0, 0, 1, 1])

    def __len__(self) -> int:
        return 4


FILES: dict[str, Callable[[Path], Any]] = {
    "ImageFolder": lambda root: ImageFolder(str(root)),
    "Images.of_files": lambda root: Images.of_files(root, [f"{name}.png" for name in NAMES], [0, 0, 1, 1]),
    "Images": lambda root: Images(ImageFolder(str(root))),
    "Subset": lambda root: Subset(ImageFolder(str(root)), range(4)),
    "ConcatDataset": lambda root: ConcatDataset([Subset(ImageFolder(str(root)), [0, 1]), Subset(Listed(root), [2, 3])]),
    "paths": Listed,
}


def differences(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


# ---- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_identity_of_files(root, make):
    before = dataset_identity(make(root))
    assert all(len(before[name]) == 32 for name in ("images", "labels")), "digests"
    assert before == dataset_identity(make(root)) == dataset_identity(make(root)) | {"given identity": "none"}
    os.utime(root / "dog" / "b.png")
    assert differences(before, dataset_identity(make(root))) == {"images"}


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
        (removed, {"number of images", "images", "labels"}),
        (relabelled, {"images", "labels"}),
        (same_size_and_time, set()),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_identity_notices_changes_of_files(root, change, noticed):
    before = dataset_identity(ImageFolder(str(root)))
    change(root)
    assert differences(before, dataset_identity(ImageFolder(str(root)))) == noticed


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_identity_is_kept_when_the_folder_moves(root, tmp_path, make, monkeypatch):
    before = dataset_identity(make(root))
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "pictures")  # keeps modification times
    assert dataset_identity(make(moved)) == before
    monkeypatch.chdir(tmp_path)
    for relative in ("images", "./images", "elsewhere/../images"):
        assert dataset_identity(make(Path(relative))) == before


def test_files_on_two_drives_of_windows(monkeypatch):
    """They have no common folder."""
    files = [identity_module._File(rf"{drive}:\images\a.png") for drive in "CD"]
    status = os.stat(__file__)
    monkeypatch.setattr(identity_module, "os", SimpleNamespace(sep="\\", path=ntpath, stat=lambda path: status))
    assert [name for name, *_ in identity_module._with_file_status(files)] == ["C:/images/a.png", "D:/images/a.png"]
    assert [name for name, *_ in identity_module._with_file_status(files[:1])] == ["a.png"]


@pytest.mark.parametrize("indices", [[0, 1], [1, 0]])
def test_identity_of_subsets(root, indices):
    for dataset in (ImageFolder(str(root)), TensorDataset(pictures(4), torch.zeros(4)), Images([(0, 0)] * 4)):
        keys = [dataset_identity(Subset(dataset, indices)), dataset_identity(Subset(dataset, [0, 3]))]
        assert "images" in differences(*keys)


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]], ids=["first", "last"])
def test_missing_file_is_refused(root, name):
    dataset = FILES["Images.of_files"](root)
    (root / f"{name}.png").unlink()
    with pytest.raises(
        CacheError, match=rf"^FeatureCache: {root}/{name}\.png, a file that the dataset lists, cannot be"
    ):
        dataset_identity(dataset)


def test_unlisted_images_are_identified_by_their_numbers():
    dataset = Images([(0, 0)] * 4)
    dataset.names = [__file__] * 4  # names of images, or of classes, are no paths
    assert dataset_identity(dataset)["images"] == dataset_identity([("an image", 0)])["images"] == "not listed"
    assert dataset_identity(Subset(dataset, [1, 0]))["images"] != dataset_identity(Subset(dataset, [0, 1]))["images"]


# ---- labels, transforms, contents -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda labels: TensorDataset(pictures(4), torch.tensor(labels)),
        lambda labels: list(zip(pictures(4), labels, strict=True)),
        lambda labels: Images([(0, 0)] * 4, labels=labels),
        lambda labels: ConcatDataset(
            [TensorDataset(pictures(2), torch.tensor(part)) for part in (labels[:2], labels[2:])]
        ),
    ],
    ids=["tensors", "list", "picked", "concatenated"],
)
def test_identity_notices_labels(make):
    assert differences(dataset_identity(make([0, 1, 2, 3])), dataset_identity(make([0, 1, 2, 2]))) == {"labels"}
    assert dataset_identity(make([0, 1, 2, 3])) == dataset_identity(make([0, 1, 2, 3]))


def darker(image: Any, by: float = 0.5) -> Any:
    return image * by


TRANSFORMS = {
    "mean, v2": (v2.Normalize([0.5], [0.2]), v2.Normalize([0.4], [0.2])),
    "order": (v1.Compose([v1.Resize(6), v1.CenterCrop(4)]), v1.Compose([v1.CenterCrop(4), v1.Resize(6)])),
    "function": (darker, images),
}


@pytest.mark.parametrize("pair", TRANSFORMS.values(), ids=TRANSFORMS)
def test_identity_notices_transforms(root, pair):
    for make in (FILES["ImageFolder"], FILES["Images.of_files"]):
        keys = []
        for transform in pair:
            dataset = make(root)
            dataset.transform = transform
            keys.append(dataset_identity(Subset(dataset, [0, 1])))
        assert differences(*keys) == {"image transform"}
    assert " at 0x" in repr(darker), "addresses are not part of it"


class Without:
    """Transform without a repr."""


def closure(by: float) -> Callable[[Any], Any]:
    return lambda image: image * by


@pytest.mark.parametrize(
    "transform",
    [
        lambda image: image,
        closure(0.5),
        Without(),
        functools.partial(closure(0.5), 1),
        v1.Compose([v1.Resize(6), Without().__init__]),
        v1.Lambda(lambda image: image),
        v2.Lambda(closure(0.5)),
    ],
    ids=["lambda", "closure", "object", "partial", "method", "v1.Lambda", "v2.Lambda"],
)
def test_transform_that_cannot_be_compared_is_refused(root, transform):
    dataset = FILES["ImageFolder"](root)
    dataset.transform = transform
    with pytest.raises(CacheError, match=r"^FeatureCache: the dataset's transform .* cannot be compared .*`identity`"):
        dataset_identity(Subset(dataset, [0, 1]))
    assert dataset_identity(dataset, "darker")["given identity"] == '"darker"'
    outer = Images(dataset)
    outer.identity = "darker"
    assert dataset_identity(outer)["image transform"] == "none"


def test_identity_argument(tmp_path):
    clip = skip_clip()
    build(tmp_path, images(9), clip, identity={"name": "noise", "version": 1})
    sk.FeatureCache.open(tmp_path, clip, images(9, seed=1), identity={"version": 1, "name": "noise"})
    with pytest.raises(CacheError, match=r"given identity \({.*1} there, {.*2} here\)"):
        sk.FeatureCache.open(tmp_path, dataset=images(9), identity={"name": "noise", "version": 2})
    with pytest.raises(CacheError, match=r"number of images \(9 there, 8 here\)"):
        sk.FeatureCache.open(tmp_path, dataset=images(8), identity={"name": "noise", "version": 1})
    for identity in (object(), float("nan")):
        with pytest.raises(ValueError, match="^FeatureCache: identity must be text or a JSON value; got "):
            build(tmp_path / "other", images(9), clip, identity=identity)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "make",
    [images, lambda seed: list(images(seed=seed)), lambda seed: Subset(images(seed=seed), range(4))],
    ids=["tensors", "list", "subset"],
)
def test_identity_notices_contents_of_tensors(make):
    assert dataset_identity(make(seed=0)) == dataset_identity(make(seed=0))
    assert differences(dataset_identity(make(seed=0)), dataset_identity(make(seed=1))) == {"images"}


def test_identity_of_a_dataset_without_files():
    dataset = Images([(0, 0)] * 2)
    found = []
    for identity in ("first", "second"):
        dataset.identity = identity
        found.append(dataset_identity(dataset)["images"])
    assert found[0] != found[1]
