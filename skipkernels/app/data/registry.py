"""Datasets by name: "KIND" or "KIND:NAME"."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .base import open_error
from .templates import Templates

if TYPE_CHECKING:
    from .source import Source

KINDS = {
    "imagefolder": "imagefolder:PATH",
    "csv": "csv:PATH",
    "hf": "hf:PATH or hf:NAME such as hf:food101",
    "coop": "coop:NAME such as coop:dtd (with `root`)",
    "pictograms": "pictograms, pictograms:TASK such as pictograms:animals",
}
"""Form of the names of each kind."""
IN_PYTHON = "dataset"
"""Kind of a dataset that was passed in Python."""
OWN = ("imagefolder", "csv", "hf", IN_PYTHON)
"""Kinds of the user's own data, of which all classes are trained, and which exports do not name."""


def is_own(data: str) -> bool:
    """Return True if a dataset is the user's own, not a published or packaged one."""
    return data.partition(":")[0] in OWN


def is_remote(data: str) -> bool:
    """Return True if opening a dataset may download it, so that a file of an unknown author must not name it.

    >>> is_remote("hf:food101"), is_remote("imagefolder:/home/me/photos")
    (True, False)
    """
    return data.partition(":")[0] == "hf" or "://" in data


def open_source(data: str, root: str | Path | None = None, templates: Templates = None) -> Source:
    """Open a dataset by name.

    Args:
        data: "KIND" or "KIND:NAME", such as "imagefolder:photos"; `KINDS` has the kinds.
        root: Folder of the datasets of coop:, or of the images of csv:.
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
    if kind in KINDS and kind != "pictograms" and not name:
        raise open_error(f"{kind}: needs a path or a name: {KINDS[kind]}.")
    if kind == "imagefolder":
        from .image_folder import open_image_folder

        return open_image_folder(name, templates)
    if kind == "csv":
        from .csv_files import open_csv

        return open_csv(name, root, templates)
    if kind == "hf":
        from .hugging_face_sets import open_hugging_face

        return open_hugging_face(name, templates)
    if kind == "coop":
        from .coop import open_coop

        return open_coop(name, root, templates)
    if kind == "pictograms":
        from .pictograms import open_pictograms

        return open_pictograms(name, templates)
    if kind == "dataset":
        raise open_error(f"{name} was passed to tune in Python. Pass it again as `dataset=`.")
    if os.path.exists(data):  # Path.exists raises an error for a name that is too long
        form = "imagefolder" if os.path.isdir(data) else "csv"
        raise open_error(f"no dataset {data!r}; did you mean {form}:{data}?")
    close = difflib.get_close_matches(kind, KINDS, 1)
    meant = f"did you mean {':'.join([close[0], *filter(None, [name])])}? Or " if close else ""
    raise open_error(f"no dataset {data!r}; {meant}choose {', '.join(KINDS.values())}.")
