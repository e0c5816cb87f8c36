"""Identity of a dataset, by entries that are compared and named.

docs/cache.md lists the changes of a dataset that this detects.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, TensorDataset

from ..digests import digest_json, digest_tensors
from ..labels import whole_number
from .folder_table import CacheError

_PATH_ATTRIBUTES = ("samples", "imgs", "paths")  # of files, or of pairs that begin with one, as in torchvision
_LABEL_ATTRIBUTES = ("labels", "targets")
# In the repr of a transform: functions with a name, and what says nothing of its contents. Torchvision's `Lambda` has
# at most the name of its function.
_NAMED_FUNCTION, _UNNAMED = re.compile(r"<function ([\w.]+) at 0x\w+>"), re.compile(r" at 0x|\bLambda\(")


def dataset_identity(dataset: Any, given: Any = None) -> dict[str, str | int]:
    """Return the entries of the identity of a cache that describe a dataset.

    `given` is text or a JSON value that identifies the dataset and its transform. Without it, digests of:

    - images: path below the common folder, size and modification time of each file; without files, the contents of
      tensors in memory, or the text `identity` of a dataset that has one;
    - labels;
    - image transform: its repr.

    An entry is "not listed" if the dataset does not list it.

    Raises:
        CacheError: If a file cannot be read, or a transform has no repr that depends on its contents alone.

    >>> import torch
    >>> dataset_identity([(torch.zeros(3, 2, 2), 1)], {"name": "zeros", "version": 2})
    {'number of images': 1, 'given identity': '{"name": "zeros", "version": 2}'}
    >>> dataset_identity([("an image", 1)])["images"]
    'not listed'
    """
    count = {"number of images": len(dataset)}  # before the digests: this difference is reported first
    if given is not None:
        try:
            return count | {"given identity": json.dumps(given, sort_keys=True, allow_nan=False)}
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"FeatureCache: identity must be text or a JSON value; got {given!a:.200} ({error})."
            ) from None
    found = _describe(dataset)
    numbers = list(range(len(dataset)))
    return count | {
        "given identity": "none",
        "images": "not listed" if found.images == numbers else digest_json(_with_file_status(found.images)),
        "labels": "not listed" if set(found.labels) == {None} else digest_json(found.labels),
        "image transform": digest_json(found.transforms) if found.transforms else "none",
    }


class _File(str):
    """Absolute path of a file."""


@dataclass
class _Description:
    """Description of a dataset and of the datasets inside it."""

    images: list[str | int]  # of each item: its file, a digest of its contents, or its number if neither is known
    labels: list[int | None]  # of each item: None if not listed
    transforms: list[Any] = field(default_factory=list)  # reprs


def _describe(dataset: Any) -> _Description:
    if isinstance(dataset, ConcatDataset):
        return _join([_describe(part) for part in dataset.datasets])
    is_subset = hasattr(dataset, "dataset") and hasattr(dataset, "indices")  # such as torch.utils.data.Subset
    indices = [int(index) for index in (dataset.indices if is_subset else range(len(dataset)))]
    own = getattr(dataset, "identity", None)
    if isinstance(own, str):
        found = _Description([f"{own} {index}" for index in indices], [None] * len(indices))
    elif is_subset:
        inner = _describe(dataset.dataset)
        found = _Description(
            [inner.images[index] for index in indices], [inner.labels[index] for index in indices], inner.transforms
        )
    else:
        found = _Description(_files(dataset) or _contents(dataset) or [*indices], [None] * len(indices))
    found.labels = _labels(dataset) or found.labels
    names = ("transform", "target_transform") if hasattr(dataset, "transform") else ("transforms",)
    own_transforms = [value for name in names if (value := getattr(dataset, name, None)) is not None]
    found.transforms = [*map(_named, own_transforms), *found.transforms]
    return found


def _join(parts: list[_Description]) -> _Description:
    """Description of the items of one dataset after those of another."""
    joined = _Description([], [])
    for part in parts:  # images that are not listed are numbered over all parts
        start = len(joined.images)
        joined.images += [image + start if isinstance(image, int) else image for image in part.images]
        joined.labels += part.labels
    if any(part.transforms for part in parts):
        joined.transforms = [part.transforms for part in parts]
    return joined


def _named(transform: Any) -> str:
    """Return the repr of a transform without the addresses of named functions."""
    text = _NAMED_FUNCTION.sub(r"\1", repr(transform))
    if _UNNAMED.search(text):
        shown = " ".join(text.split())
        raise CacheError(
            f"FeatureCache: the dataset's transform {shown:.200} cannot be compared with another one. Pass `identity`, "
            "text that you change with it; or use a named function of a module, or a class with a __repr__ that shows "
            "its arguments."
        )
    return text


def _files(dataset: Any) -> list[str | int]:
    """Return the path of each item from the first attribute that lists files; empty if there is none."""
    for name in _PATH_ATTRIBUTES:
        entries = getattr(dataset, name, None)
        if isinstance(entries, (list, tuple, np.ndarray)) and len(entries) == len(dataset):
            paths = [entry[0] if isinstance(entry, (list, tuple)) and entry else entry for entry in entries]
            if all(isinstance(path, (str, Path)) for path in paths):
                return [_File(os.path.abspath(path)) for path in paths]
    return []


def _contents(dataset: Any) -> list[str | int]:
    """Return a digest of each image of a dataset in memory; empty for other datasets."""
    if isinstance(dataset, TensorDataset):
        images = list(dataset.tensors[0])
    elif isinstance(dataset, (list, tuple)):
        images = [item[0] if isinstance(item, (list, tuple)) and len(item) == 2 else None for item in dataset]
    else:
        return []
    return [digest_tensors([("", x)]) if isinstance(x, Tensor) else number for number, x in enumerate(images)]


def _labels(dataset: Any) -> list[int | None]:
    """Return the label of each item; empty unless the dataset lists one whole number for each without loading it."""
    listed = (getattr(dataset, name, None) for name in _LABEL_ATTRIBUTES)
    values: Any = next((value for value in listed if value is not None), None)
    if isinstance(dataset, TensorDataset):
        values = dataset.tensors[-1]
    elif isinstance(dataset, (list, tuple)):
        values = [item[1] if isinstance(item, (list, tuple)) and len(item) == 2 else None for item in dataset]
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or len(values) != len(dataset):
        return []
    labels = list(map(whole_number, values))
    return [] if None in labels else labels


def _with_file_status(images: list[str | int]) -> list[Any]:
    """Replace each file by [path below the common folder, size, modification time]."""
    folders = [image.split(os.sep)[:-1] for image in images if isinstance(image, _File)]
    depth = len(os.path.commonprefix(folders))  # of the common folder; 0 on two drives of Windows

    def described(image: str | int) -> Any:
        if not isinstance(image, _File):
            return image
        try:
            status = os.stat(image)
        except OSError as error:
            raise CacheError(
                f"FeatureCache: {image}, a file that the dataset lists, cannot be read ({error.strerror}). Restore or "
                "remove it; or pass `identity` for a dataset of other names."
            ) from None
        return ["/".join(image.split(os.sep)[depth:]), status.st_size, status.st_mtime_ns]

    return [described(image) for image in images]
