"""Registry of data sources: each kind of dataset has a function that opens it by name."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .base import open_error
from .templates import Templates

if TYPE_CHECKING:
    from .source import Source

Opener = Callable[[str, "str | Path | None", Templates], "Source"]


class Kind(NamedTuple):
    """Kind of dataset, which `open_source` opens by the names "KIND" and "KIND:NAME"."""

    open: Opener  # Function of (NAME, root, templates), with an empty NAME for "KIND"
    usage: str  # Form of the names
    own: bool = False  # The user's own data: all classes are trained, and exports don't name them
    remote: bool = False  # It may download what a name names, so that a file of an unknown author must not name it


def _imported(module: str, function: str, *options: str) -> Opener:
    """Opener that imports a function on demand, and passes the name and some of the other arguments."""

    def open_now(name: str, root: str | Path | None, templates: Templates) -> Source:
        given = {"root": root, "templates": templates}
        opener = getattr(importlib.import_module(module, __package__), function)
        return opener(name, **{option: given[option] for option in options})

    return open_now


KINDS = {
    "imagefolder": Kind(
        _imported(".image_folder", "open_image_folder", "templates"),
        "imagefolder:PATH",
        own=True,
    ),
    "csv": Kind(
        _imported(".csv_files", "open_csv", "root", "templates"),
        "csv:PATH",
        own=True,
    ),
    "hf": Kind(
        _imported(".hugging_face_sets", "open_hugging_face", "templates"),
        "hf:PATH or hf:NAME such as hf:food101",
        own=True,
        remote=True,
    ),
    "coop": Kind(
        _imported(".coop", "open_coop", "root", "templates"),
        "coop:NAME such as coop:dtd (with `root`)",
    ),
    "pictograms": Kind(
        _imported("..demo.pictograms", "open_pictograms", "templates"),
        "pictograms, pictograms:TASK such as pictograms:animals",
    ),
}


def is_own(data: str) -> bool:
    """Return True if a dataset is the user's own, not a published or packaged one."""
    kind = data.partition(":")[0]
    return kind == "dataset" or (kind in KINDS and KINDS[kind].own)


def is_remote(data: str) -> bool:
    """Return True if opening a dataset may download it.

    >>> is_remote("hf:food101"), is_remote("imagefolder:/home/me/photos")
    (True, False)
    """
    kind = data.partition(":")[0]
    return "://" in data or (kind in KINDS and KINDS[kind].remote)


def open_source(data: str, root: str | Path | None = None, templates: Templates = None) -> Source:
    """Open a dataset by name.

    Args:
        data: "KIND" or "KIND:NAME", such as "imagefolder:photos"; `KINDS` has the kinds.
        root: Folder of the datasets.
        templates: Prompt templates, the first for training; or "paper" or "coop", the sets of those papers. Default:
            "paper".

    Raises:
        InputError: If there is no such dataset, or it can't be used.

    Example:
        >>> source = open_source("pictograms:food")
        >>> len(source.classes), source.prompts[0][0]
        (130, 'an icon of a amphora')
        >>> source.subset_classes([1, 0]).images("train").labels
        [1, 1, 0, 0]
    """
    kind, _, name = data.partition(":")
    if kind in KINDS:
        return KINDS[kind].open(name, root, templates)
    if kind == "dataset":
        raise open_error(f"{name} was passed to tune in Python. Pass it again as `dataset=`.")
    if os.path.exists(data):  # Path.exists raises an error for a name that is too long
        form = "imagefolder" if os.path.isdir(data) else "csv"
        raise open_error(f"no dataset {data!r}; did you mean {form}:{data}?")
    close = difflib.get_close_matches(kind, KINDS, 1)
    meant = f"did you mean {':'.join([close[0], *filter(None, [name])])}? Or " if close else ""
    usages = ", ".join(kind.usage for kind in KINDS.values())
    raise open_error(f"no dataset {data!r}; {meant}choose {usages}.")
