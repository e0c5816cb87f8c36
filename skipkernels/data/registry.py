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


class _Kind(NamedTuple):
    open: Opener
    usage: str


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
    "imagefolder": _Kind(_open_image_folder, "imagefolder:PATH"),
    "csv": _Kind(_open_csv, "csv:PATH"),
    "wds": _Kind(_open_shards, "wds:SHARDS such as wds:shards/{000..012}.tar"),
    "hf": _Kind(_open_hugging_face, "hf:PATH or hf:NAME such as hf:food101"),
    "coop": _Kind(_open_coop, "coop:NAME such as coop:dtd (with `root`)"),
    "torchvision": _Kind(_open_torchvision, "torchvision:NAME such as torchvision:food101 (with `root`)"),
}


def register_source(kind: str, opener: Opener, usage: str) -> None:
    """Register a kind of dataset, which `open_source` opens by the names "KIND" and "KIND:NAME".

    Args:
        kind: Part of the name before the colon.
        opener: Function of (NAME, root, templates, download); see `open_source`. NAME is empty for "KIND".
        usage: Form of the names, for error messages.
    """
    _KINDS[kind] = _Kind(opener, usage)


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
    usages = ", ".join(kind.usage for kind in _KINDS.values())
    raise open_error(f"no dataset {data!r}; choose {usages}.")
