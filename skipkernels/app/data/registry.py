"""Datasets by name: "KIND" or "KIND:NAME"."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...options import Protocol
from .base import open_error
from .templates import Templates

if TYPE_CHECKING:
    from .source import Source


class Kind(NamedTuple):
    """Kind of datasets."""

    form: str  # of their names
    opener: str  # module and function, which takes the name after the colon
    has_root: bool = False  # the function takes `root`
    own: bool = False  # the user's data, of which all classes are trained, and which exports do not name
    remote: bool = False  # opening it may download it


KINDS = {
    "imagefolder": Kind("imagefolder:PATH", "image_folder:open_image_folder", own=True),
    "csv": Kind("csv:PATH", "csv_files:open_csv", has_root=True, own=True),
    "hf": Kind("hf:PATH or hf:NAME such as hf:food101", "hugging_face_sets:open_hugging_face", own=True, remote=True),
    "coop": Kind("coop:NAME such as coop:dtd (with `root`)", "coop:open_coop", has_root=True),
    "pictograms": Kind("pictograms, pictograms:TASK such as pictograms:animals", "pictograms:open_pictograms"),
}
"""Kinds by the beginning of their names."""
IN_PYTHON = "dataset"
"""Kind of a dataset that was passed in Python."""


def is_in_python(data: str) -> bool:
    """Return True for the name of a dataset that was passed in Python."""
    return data.startswith(f"{IN_PYTHON}:")


def is_own(data: str) -> bool:
    """Return True if a dataset is the user's own, not a published or packaged one."""
    kind = data.partition(":")[0]
    return is_in_python(data) or (kind in KINDS and KINDS[kind].own)


def default_protocol(data: str) -> Protocol:
    """Return the protocol of a run on a dataset, where none is given."""
    return "few-shot" if is_own(data) else "base-to-new"


def is_remote(data: str) -> bool:
    """Return True if opening a dataset may download it, so that a file of an unknown author must not name it.

    >>> is_remote("hf:food101"), is_remote("imagefolder:/home/me/photos")
    (True, False)
    """
    kind = data.partition(":")[0]
    return (kind in KINDS and KINDS[kind].remote) or "://" in data


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
    if kind in KINDS:
        record = KINDS[kind]
        if not name and kind != "pictograms":
            raise open_error(f"{kind}: needs a path or a name: {record.form}.")
        module, function = record.opener.split(":")
        opener = getattr(importlib.import_module(f".{module}", __package__), function)
        return opener(name, templates=templates, **({"root": root} if record.has_root else {}))
    if is_in_python(data):
        raise open_error(f"{name} was passed to tune in Python. Pass it again as `dataset=`.")
    if os.path.exists(data):  # Path.exists raises an error for a name that is too long
        form = "imagefolder" if os.path.isdir(data) else "csv"
        raise open_error(f"no dataset {data!r}; did you mean {form}:{data}?")
    raise open_error(f"no dataset {data!r}; choose {', '.join(each.form for each in KINDS.values())}.")
