"""Registry of data sources: each kind of dataset has a function that opens it by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .base import open_error
from .templates import Templates

if TYPE_CHECKING:
    from .source import Source

Opener = Callable[[str, "str | Path | None", Templates, bool], "Source"]


class Kind(NamedTuple):
    """Kind of dataset: its opener, the form of its names, a description, and options of an example."""

    open: Opener
    usage: str
    about: str = ""
    example: str = ""


# Imported on demand: no other source needs torchvision, and registering a source needs none of these.
def _open_image_folder(name: str, root: str | Path | None, templates: Templates, download: bool) -> Source:
    from .image_folder import open_image_folder

    return open_image_folder(name, templates)


def _open_csv(name: str, root: str | Path | None, templates: Templates, download: bool) -> Source:
    from .csv_files import open_csv

    return open_csv(name, root, templates)


def _open_shards(name: str, root: str | Path | None, templates: Templates, download: bool) -> Source:
    from .tar_shards import open_shards

    return open_shards(name, templates)


def _open_hugging_face(name: str, root: str | Path | None, templates: Templates, download: bool) -> Source:
    from .hugging_face_sets import open_hugging_face

    return open_hugging_face(name, templates)


def _open_coop(name: str, root: str | Path | None, templates: Templates, download: bool) -> Source:
    from .coop import open_coop

    return open_coop(name, root, templates)


def _open_torchvision(name: str, root: str | Path | None, templates: Templates, download: bool) -> Source:
    from .torchvision_sets import open_torchvision

    return open_torchvision(name, root, templates, download=download)


OWN = ("imagefolder", "csv", "wds", "hf", "dataset")
"""Kinds of the user's own data: all classes are trained, and the best epoch is chosen on validation images."""

_KINDS = {
    "imagefolder": Kind(
        _open_image_folder,
        "imagefolder:PATH",
        "A folder for each class, or folders train/, val/ and test/ that have them.",
        "--data imagefolder:photos",
    ),
    "csv": Kind(
        _open_csv,
        "csv:PATH",
        "A table with the columns path and label (or caption), and split if there is one.",
        "--data csv:photos/table.csv",
    ),
    "wds": Kind(
        _open_shards,
        "wds:SHARDS such as wds:shards/{000..012}.tar",
        "Tar files of webdataset: images with .cls, .json or .txt.",
        "--data 'wds:shards/{000..012}.tar'",
    ),
    "hf": Kind(
        _open_hugging_face,
        "hf:PATH or hf:NAME such as hf:food101",
        "A dataset of Hugging Face on the disk, or of the hub. Columns by name: ?image=…&label=….",
        "--data hf:food101",
    ),
    "coop": Kind(
        _open_coop,
        "coop:NAME such as coop:dtd (with `root`)",
        "The benchmarks of CoOp, in its layout: imagenet, caltech101, oxford_pets, stanford_cars, oxford_flowers, "
        "food101, fgvc_aircraft, sun397, dtd, eurosat, ucf101, imagenetv2, imagenet_sketch, imagenet_a, imagenet_r.",
        "--data coop:dtd --root datasets",
    ),
    "torchvision": Kind(
        _open_torchvision,
        "torchvision:NAME such as torchvision:food101 (with `root`)",
        "Datasets that torchvision can download: cifar10, cifar100, dtd, eurosat, fashionmnist, fgvcaircraft, "
        "flowers102, food101, imagenette, mnist, oxfordiiitpet, stl10, sun397.",
        "--data torchvision:food101 --root datasets --download",
    ),
}


def source_kinds() -> dict[str, Kind]:
    """Return the registered kinds of datasets."""
    return dict(_KINDS)


def register_source(kind: str, opener: Opener, usage: str, about: str = "", example: str = "") -> None:
    """Register a kind of dataset, which `open_source` opens by the names "KIND" and "KIND:NAME".

    Args:
        kind: Part of the name before the colon.
        opener: Function of (NAME, root, templates, download); see `open_source`. NAME is empty for "KIND".
        usage: Form of the names, for error messages.
        about: Description, for `skipkernels datasets`.
        example: Options of an example, for `skipkernels datasets`.
    """
    _KINDS[kind] = Kind(opener, usage, about, example)


def open_source(
    data: str, root: str | Path | None = None, templates: Templates = None, *, download: bool = False
) -> Source:
    """Open a dataset by name.

    Args:
        data: "imagefolder:PATH" (see `image_folder`); "csv:PATH", a table (see `csv_files`); "wds:SHARDS", tar files of
            webdataset (see `tar_shards`); "hf:PATH" or "hf:NAME" (see `hugging_face_sets`); "coop:NAME", a dataset in
            CoOp's layout below `root` (see `coop`); "torchvision:NAME", a dataset of torchvision in `root`; after
            `import skipkernels.experiments` also "glyphs" or "glyphs:BLOCK[+BLOCK…]" (see `experiments.glyphs`).
        root: Folder of the datasets.
        templates: Prompt templates, the first for training; or "paper" or "coop", the sets of those papers. Default:
            "paper".
        download: Let torchvision download a missing dataset.

    Raises:
        InputError: If there is no such dataset, or it can't be used.

    Example:
        >>> import skipkernels.experiments  # registers glyphs
        >>> source = open_source("glyphs:greek")
        >>> len(source.classes), source.prompts[0][0]
        (120, 'the character greek capital letter heta.')
        >>> source.subset_classes([1, 0]).images("test").labels[:13]
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    """
    kind, _, name = data.partition(":")
    if kind in _KINDS:
        return _KINDS[kind].open(name, root, templates, download)
    if kind == "glyphs":
        raise open_error("glyphs need `import skipkernels.experiments`, which registers them.")
    if kind == "dataset":
        raise open_error(f"{name} was passed to tune in Python. Pass it again as `dataset=`.")
    usages = ", ".join(kind.usage for kind in _KINDS.values())
    raise open_error(f"no dataset {data!r}; choose {usages}.")
