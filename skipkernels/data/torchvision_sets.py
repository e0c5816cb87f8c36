"""Datasets that torchvision can fetch: `torchvision:NAME` with `--root`, the folder where it keeps them."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torchvision import datasets

from .base import InputError
from .files import absolute
from .image_folder import divide
from .images import Images, LabelledImages, PickedImages, labels_of
from .source import Split, SplitSource, at_hand, tidy
from .templates import Templates, templates_of

# What torchvision raises for files that are not there or damaged.
_UNUSABLE = (RuntimeError, OSError, LookupError, ValueError, TypeError, AttributeError)
# As CoOp names the classes, whose folders have no spaces.
_EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}


def _eurosat(name: str) -> str:
    return _EUROSAT.get(name, name)


def _place_first(name: str) -> str:
    """Of "apartment_building/outdoor", "outdoor apartment_building"."""
    return " ".join(reversed(name.split("/")))


def _word(name: str) -> str:
    """Of "0 - zero", "zero"."""
    return name.rpartition(" - ")[2]


def _first(names: tuple[str, ...]) -> str:
    """Of synonyms."""
    return names[0]


@dataclass(frozen=True)
class TorchvisionSet:
    """How to ask torchvision for a dataset.

    Attributes:
        type: Its class in `torchvision.datasets`.
        splits: Arguments for each split; if there are none, its images are divided as those of a folder.
        coop: What it is in `templates.PAPER` and `templates.COOP`, if there.
        name: The name of a class as people say it.
    """

    type: str
    splits: Mapping[Split, dict[str, Any]] = field(default_factory=dict)
    coop: str | None = None
    name: Callable[[Any], str] = str


_TRAIN: dict[Split, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_TWO: dict[Split, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: dict[Split, dict[str, Any]] = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}

SETS = {
    "cifar10": TorchvisionSet("CIFAR10", _TRAIN),
    "cifar100": TorchvisionSet("CIFAR100", _TRAIN),
    "dtd": TorchvisionSet("DTD", _THREE, "dtd"),
    "eurosat": TorchvisionSet("EuroSAT", {}, "eurosat", _eurosat),
    "fashionmnist": TorchvisionSet("FashionMNIST", _TRAIN),
    "fgvcaircraft": TorchvisionSet("FGVCAircraft", _THREE, "fgvc_aircraft"),
    "flowers102": TorchvisionSet("Flowers102", _THREE, "oxford_flowers"),
    "food101": TorchvisionSet("Food101", _TWO, "food101"),
    "imagenette": TorchvisionSet("Imagenette", {"train": {"split": "train"}, "test": {"split": "val"}}, name=_first),
    "mnist": TorchvisionSet("MNIST", _TRAIN, name=_word),
    "oxfordiiitpet": TorchvisionSet(
        "OxfordIIITPet", {"train": {"split": "trainval"}, "test": {"split": "test"}}, "oxford_pets"
    ),
    "stl10": TorchvisionSet("STL10", _TWO),
    "sun397": TorchvisionSet("SUN397", {}, "sun397", _place_first),
}


def open_torchvision(
    name: str, root: str | Path | None, templates: Templates = None, *, download: bool = False
) -> SplitSource:
    """A dataset of torchvision.

    Args:
        name: A key of `SETS`, in any case of letters.
        root: The folder where torchvision keeps it.
        templates: As for `open_source`.
        download: Let torchvision fetch it if it is not there.

    Raises:
        InputError: If there is no such dataset, or it is not in the folder; says how to fetch it.
    """
    key = name.lower()
    if key not in SETS:
        raise InputError(f"--data: no dataset {name!r} of torchvision here; choose torchvision: and {', '.join(SETS)}.")
    spec, chosen = f"torchvision:{key}", SETS[key]
    if root is None:
        raise InputError(f"--root: {spec} needs the folder where torchvision keeps its datasets.")
    base = absolute(root)

    @functools.cache
    def dataset(split: Split) -> Any:
        try:
            return getattr(datasets, chosen.type)(str(base), download=download, **chosen.splits.get(split, {}))
        except ImportError as error:  # Flowers102 is read with scipy
            raise InputError(f"--data: {spec} needs a package more: {error}. Install it with pip.") from error
        except _UNUSABLE as error:
            remedy = (
                "Is the network there, and the folder writable?"
                if download
                else "Fetch it with --download, or in Python with "
                f"torchvision.datasets.{chosen.type}({str(base)!r}, download=True)."
            )
            raise InputError(
                f"--root: {spec}: not usable in {base} ({' '.join(str(error).split())}). {remedy}"
            ) from error

    @functools.cache
    def images(split: Split) -> Images:
        return _images(dataset(split), base)

    notes: tuple[str, ...] = ()
    parts: dict[Split, Callable[[], Images]] = {split: partial(images, split) for split in chosen.splits}
    if not chosen.splits:
        parts = {split: at_hand(part) for split, part in _divided(images("train"), spec).items()}
        notes = (f"{spec}: it comes without splits, so the images of each class are divided by a hash of their paths.",)
    classes = tuple(tidy(chosen.name(found)) for found in dataset("train").classes)
    return SplitSource(spec, classes, templates_of(chosen.coop, templates), parts, notes=notes)


def _images(dataset: Any, root: Path) -> Images:
    """Of a dataset that lists its files, these, in the order of their paths: SUN397 lists them as the disk does."""
    files = next((getattr(dataset, name) for name in ("_image_files", "_images") if hasattr(dataset, name)), None)
    if files is not None:
        listed = list(zip(map(str, files), labels_of(dataset), strict=True))
    else:
        listed = next((getattr(dataset, name) for name in ("samples", "_samples") if hasattr(dataset, name)), [])
    if not listed:  # arrays
        return PickedImages(dataset)
    relative = sorted((Path(path).relative_to(root).as_posix(), label) for path, label in listed)
    return LabelledImages(root, [path for path, _ in relative], [label for _, label in relative])


def _divided(images: Images, spec: str) -> dict[Split, Images]:
    of_class: dict[str, list[str]] = defaultdict(list)
    for name, label in zip(images.names, images.labels, strict=True):
        of_class[str(label)].append(name)
    number = {name: index for index, name in enumerate(images.names)}
    return {
        split: images.subset(sorted(number[name] for names in part.values() for name in names))
        for split, part in divide(spec, of_class).items()
    }
