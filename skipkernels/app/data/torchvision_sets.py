"""Datasets of torchvision: `torchvision:NAME` in the folder `root`, where torchvision stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchvision import datasets

from .base import open_error
from .files import absolute_path
from .images import DatasetImages, Images, LabelledImages, read_labels
from .source import Source, Split, normalize_class_name
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
    "eurosat": TorchvisionSet("EuroSAT", {}, "eurosat", lambda name: _EUROSAT_NAMES.get(name, name)),
    "fashionmnist": TorchvisionSet("FashionMNIST", _TRAIN),
    "fgvcaircraft": TorchvisionSet("FGVCAircraft", _THREE, "fgvc_aircraft"),
    "flowers102": TorchvisionSet("Flowers102", _THREE, "oxford_flowers"),
    "food101": TorchvisionSet("Food101", _TWO, "food101"),
    "imagenette": TorchvisionSet(
        "Imagenette", {"train": {"split": "train"}, "test": {"split": "val"}}, class_name=lambda names: names[0]
    ),
    "mnist": TorchvisionSet("MNIST", _TRAIN, class_name=lambda name: name.rpartition(" - ")[2]),
    "oxfordiiitpet": TorchvisionSet(
        "OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}, "oxford_pets"
    ),
    "stl10": TorchvisionSet("STL10", _TWO),
    "sun397": TorchvisionSet("SUN397", {}, "sun397", lambda name: " ".join(reversed(name.split("/")))),
}


def open_torchvision(
    name: str, root: str | Path | None, templates: Templates = None, *, download: bool = False
) -> Source:
    """Open a dataset of torchvision, stored in `root`; `name` is a key of `DATASETS`, in any case of letters."""
    key = name.lower()
    if key not in DATASETS:
        raise open_error(f"no dataset {name!r} of torchvision; choose torchvision: and one of {', '.join(DATASETS)}.")
    full_name, dataset = f"torchvision:{key}", DATASETS[key]
    if root is None:
        raise open_error(f"{full_name} needs the folder where torchvision stores its datasets.", "root")
    base = absolute_path(root)
    loaded: dict[Split, Any] = {}
    try:
        for split, arguments in (dataset.splits or {"train": {}}).items():
            loaded[split] = getattr(datasets, dataset.type)(str(base), download=download, **arguments)
    except ImportError as error:  # Flowers102 is read with scipy
        raise open_error(f"{full_name} needs another package: {error}. Install it with pip.") from error
    except _UNUSABLE as error:
        remedy = "Is the network available, and is the folder writable?" if download else "Add `download=True`."
        message = " ".join(str(error).split())
        raise open_error(f"{full_name}: not usable in {base} ({message}). {remedy}", "root") from error
    splits = {split: _images(part, base) for split, part in loaded.items()}
    notes: tuple[str, ...] = ()
    names = [dataset.class_name(name) for name in loaded["train"].classes]
    if not dataset.splits:
        splits, _ = hash_splits(splits["train"], names, "get it again")
        notes = (f"{full_name}: has no splits, so the images of each class are split by a hash of their paths.",)
    classes = tuple(map(normalize_class_name, names))
    return Source(full_name, classes, resolve_templates(dataset.coop, templates), splits=splits, notes=notes)


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
