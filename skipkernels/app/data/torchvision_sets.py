"""Datasets of torchvision: `torchvision:NAME` in the folder `root`, where torchvision stores them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torchvision import datasets

from .base import open_error
from .files import absolute_path
from .images import DatasetImages, Images, LabelledImages, read_labels
from .source import Split, SplitSource, constant_split, normalize_class_name
from .splits import hash_splits
from .templates import Templates, resolve_templates

# Raised by torchvision for missing or damaged files.
_UNUSABLE = (RuntimeError, OSError, LookupError, ValueError, TypeError, AttributeError)
# CoOp's class names; torchvision's have no spaces.
_EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}


def _eurosat_name(name: str) -> str:
    return _EUROSAT_NAMES.get(name, name)


def _sun397_name(name: str) -> str:
    """Return "outdoor apartment_building" for "apartment_building/outdoor"."""
    return " ".join(reversed(name.split("/")))


def _mnist_name(name: str) -> str:
    """Return "zero" for "0 - zero"."""
    return name.rpartition(" - ")[2]


def _first_synonym(names: tuple[str, ...]) -> str:
    return names[0]


@dataclass(frozen=True)
class TorchvisionSet:
    """Description of a dataset of torchvision."""

    type: str  # Name of its class in `torchvision.datasets`
    # Constructor arguments for each split; if empty, images are split by a hash of their paths
    splits: Mapping[Split, dict[str, Any]] = field(default_factory=dict)
    coop: str | None = None  # Key of the dataset in `templates.PAPER` and `templates.COOP`, if any
    class_name: Callable[[Any], str] = str  # Converts an item of torchvision's `classes` to a class name


_TRAIN: dict[Split, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TWO: dict[Split, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: dict[Split, dict[str, Any]] = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}

DATASETS = {
    "cifar10": TorchvisionSet("CIFAR10", _TRAIN),
    "cifar100": TorchvisionSet("CIFAR100", _TRAIN),
    "dtd": TorchvisionSet("DTD", _THREE, "dtd"),
    "eurosat": TorchvisionSet("EuroSAT", {}, "eurosat", _eurosat_name),
    "fashionmnist": TorchvisionSet("FashionMNIST", _TRAIN),
    "fgvcaircraft": TorchvisionSet("FGVCAircraft", _THREE, "fgvc_aircraft"),
    "flowers102": TorchvisionSet("Flowers102", _THREE, "oxford_flowers"),
    "food101": TorchvisionSet("Food101", _TWO, "food101"),
    "imagenette": TorchvisionSet(
        "Imagenette", {"train": {"split": "train"}, "test": {"split": "val"}}, class_name=_first_synonym
    ),
    "mnist": TorchvisionSet("MNIST", _TRAIN, class_name=_mnist_name),
    "oxfordiiitpet": TorchvisionSet(
        "OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}, "oxford_pets"
    ),
    "stl10": TorchvisionSet("STL10", _TWO),
    "sun397": TorchvisionSet("SUN397", {}, "sun397", _sun397_name),
}


def open_torchvision(
    name: str, root: str | Path | None, templates: Templates = None, *, download: bool = False
) -> SplitSource:
    """Open a dataset of torchvision, stored in `root`; `name` is a key of `DATASETS`, in any case of letters."""
    key = name.lower()
    if key not in DATASETS:
        raise open_error(f"no dataset {name!r} of torchvision; choose torchvision: and one of {', '.join(DATASETS)}.")
    full_name, dataset = f"torchvision:{key}", DATASETS[key]
    if root is None:
        raise open_error(f"{full_name} needs the folder where torchvision stores its datasets.", "root")
    base = absolute_path(root)

    @functools.cache
    def load(split: Split) -> Any:
        try:
            return getattr(datasets, dataset.type)(str(base), download=download, **dataset.splits.get(split, {}))
        except ImportError as error:  # Flowers102 is read with scipy
            raise open_error(f"{full_name} needs another package: {error}. Install it with pip.") from error
        except _UNUSABLE as error:
            remedy = "Is the network available, and is the folder writable?" if download else "Add `download=True`."
            message = " ".join(str(error).split())
            raise open_error(f"{full_name}: not usable in {base} ({message}). {remedy}", "root") from error

    @functools.cache
    def images(split: Split) -> Images:
        return _images(load(split), base)

    notes: tuple[str, ...] = ()
    splits: dict[Split, Callable[[], Images]] = {split: partial(images, split) for split in dataset.splits}
    if not dataset.splits:
        parts, _ = hash_splits(images("train"), list(map(str, load("train").classes)), "get it again")
        splits = {split: constant_split(part) for split, part in parts.items()}
        notes = (f"{full_name}: has no splits, so the images of each class are split by a hash of their paths.",)
    classes = tuple(normalize_class_name(dataset.class_name(name)) for name in load("train").classes)
    return SplitSource(full_name, classes, resolve_templates(dataset.coop, templates), splits, notes=notes)


def _images(dataset: Any, root: Path) -> Images:
    """Return the images of a dataset; files are sorted by path, since SUN397 lists them in disk order."""
    files = next((getattr(dataset, name) for name in ("_image_files", "_images") if hasattr(dataset, name)), None)
    if files is not None:
        listed = list(zip(map(str, files), read_labels(dataset), strict=True))
    else:
        listed = next((getattr(dataset, name) for name in ("samples", "_samples") if hasattr(dataset, name)), [])
    if not listed:  # arrays
        return DatasetImages(dataset)
    relative = sorted((Path(path).relative_to(root).as_posix(), label) for path, label in listed)
    return LabelledImages(root, [path for path, _ in relative], [label for _, label in relative])
