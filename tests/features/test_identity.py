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


# ---- two versions of a dataset ---------------------------------------------------------------------------------------

Make = Callable[[Path, int], Any]


def after(change: Callable[[Path], object]) -> Make:
    """The images of a folder, which is changed before the second version."""

    def make(root: Path, version: int) -> Any:
        if version:
            change(root)
        return ImageFolder(str(root))

    return make


def rewrite(path: Path, changed: Callable[[bytes], bytes]) -> None:
    path.write_bytes(changed(path.read_bytes()))
    os.utime(path, ns=(LONG_AGO, LONG_AGO))


def darker(image: Any, by: float = 0.5) -> Any:
    return image * by


def transformed(first: Any, second: Any, kind: str = "ImageFolder") -> Make:
    """Some images of a dataset with one of two transforms."""

    def make(root: Path, version: int) -> Any:
        dataset = FILES[kind](root)
        dataset.transform = second if version else first
        return Subset(dataset, [0, 1])

    return make


def named(root: Path, version: int) -> Images:
    dataset = Images([(0, 0)] * 2)
    dataset.identity = f"version {version}"
    return dataset


LABELS, ORDERS, CROPS = ([0, 1, 2, 3], [0, 1, 2, 2]), ([0, 1], [1, 0]), (v1.Resize(6), v1.CenterCrop(4))
NORMALIZED = transformed(v2.Normalize([0.5], [0.2]), v2.Normalize([0.4], [0.2]))
VERSIONS: dict[str, tuple[Make, set[str]]] = {
    "file renamed": (after(lambda root: (root / "cat/b.png").rename(root / "cat/c.png")), {"images"}),
    "file grown": (after(lambda root: rewrite(root / "dog/b.png", lambda data: data + b"more")), {"images"}),
    "file removed": (after(lambda root: (root / "dog/b.png").unlink()), {"number of images", "images", "labels"}),
    "file of another class": (
        after(lambda root: (root / "dog/b.png").rename(root / "cat/d.png")), {"images", "labels"},
    ),
    "file of this size and time": (
        after(lambda root: rewrite(root / "dog/b.png", lambda data: data[:-1] + b"?")), set(),
    ),
    "order of files": (lambda root, v: Subset(ImageFolder(str(root)), ORDERS[v]), {"images"}),
    "order of tensors": (lambda root, v: Subset(TensorDataset(pictures(4), torch.zeros(4)), ORDERS[v]), {"images"}),
    "order of unlisted images": (lambda root, v: Subset(Images([(0, 0)] * 4), ORDERS[v]), {"images"}),
    "tensors": (lambda root, v: images(seed=v), {"images"}),
    "list": (lambda root, v: list(images(seed=v)), {"images"}),
    "subset": (lambda root, v: Subset(images(seed=v), range(4)), {"images"}),
    "identity": (named, {"images"}),
    "labels of tensors": (lambda root, v: TensorDataset(pictures(4), torch.tensor(LABELS[v])), {"labels"}),
    "labels of a list": (lambda root, v: list(zip(pictures(4), LABELS[v], strict=True)), {"labels"}),
    "labels of images": (lambda root, v: Images([(0, 0)] * 4, labels=LABELS[v]), {"labels"}),
    "labels of parts": (
        lambda root, v: ConcatDataset([TensorDataset(pictures(2), torch.tensor(LABELS[v][i : i + 2])) for i in (0, 2)]),
        {"labels"},
    ),
    "mean of a transform": (NORMALIZED, {"image transform"}),
    "mean in a part": (lambda root, v: ConcatDataset([NORMALIZED(root, v), images()]), {"image transform"}),
    "order of transforms": (transformed(v1.Compose(CROPS), v1.Compose(CROPS[::-1])), {"image transform"}),
    "function": (transformed(darker, images), {"image transform"}),  # by its name: the repr has an address
    "function of images": (transformed(darker, images, "Images.of_files"), {"image transform"}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "noticed"), VERSIONS.values(), ids=VERSIONS)
def test_identity_notices_another_version(root, make, noticed):
    first, again, second = (dataset_identity(make(root, version)) for version in (0, 0, 1))
    assert first == again and differences(first, second) == noticed


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_identity_of_files(root, make):
    before = dataset_identity(make(root))
    assert all(len(before[name]) == 32 for name in ("images", "labels")), "digests"
    assert before == dataset_identity(make(root)) == dataset_identity(make(root)) | {"given identity": "none"}
    os.utime(root / "dog" / "b.png")
    assert differences(before, dataset_identity(make(root))) == {"images"}


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


@pytest.mark.parametrize("name", [NAMES[0], NAMES[3]], ids=["first", "last"])
def test_missing_file_is_refused(root, name):
    dataset = FILES["Images.of_files"](root)
    (root / f"{name}.png").unlink()
    with pytest.raises(
        CacheError, match=rf"^FeatureCache: {root}/{name}\.png, a file that the dataset lists, cannot be"
    ):
        dataset_identity(dataset)


class Named(Dataset):
    """Images that are not listed; names of images, or of classes, are no paths."""

    names = [__file__] * 4

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize(
    "dataset",
    [Named(), ConcatDataset([Named(), Named()]), [("an image", None), ("an image", 0.5)]],
    ids=["names", "parts", "labels"],
)
def test_what_is_not_listed(dataset):
    found = dataset_identity(dataset)
    assert (found["images"], found["labels"], found["image transform"]) == ("not listed", "not listed", "none")


# ---- transforms that cannot be compared, and a given identity --------------------------------------------------------


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
