"""Identity of a cache: the model below the cut and the dataset, by entries that are compared and named.

docs/cache.md lists the changes of a dataset that this detects.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, TensorDataset

from ..digests import digest_json, digest_tensors
from .table import CacheError, Layout

if TYPE_CHECKING:
    from ..clip import SkipCLIP

# Attributes that list the files of a dataset, as paths or (path, label), absolute or relative to `root`: those of
# torchvision's ImageFolder and similar datasets, then private ones of other torchvision datasets.
_PATH_ATTRIBUTES = ("samples", "imgs", "paths", "names", "_samples", "_image_files", "_images")
_LABEL_ATTRIBUTES = ("labels", "targets", "_labels")

_PROBED = 64  # numbers of the probe that are stored
# Tolerance of the probe, relative to its norm. Rounding differs with the device, number of threads and TF32; another
# activation, mask or number of heads changes more, even with small random weights.
PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}


# ---- model -----------------------------------------------------------------------------------------------------------


def model_identity(clip: SkipCLIP) -> dict[str, str | int]:
    """Return what image features depend on below the cut: weights, buffers and the cut."""
    return {f"image {name}": value for name, value in clip.images.tower.lower_identity().items()}


def probe(clip: SkipCLIP) -> Tensor:
    """Some features of a fixed image, [64]: another activation or number of heads changes them, and no weight."""
    height, width = clip.image_size
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(clip.prototypes.device)
    with torch.autocast(image.device.type, enabled=False):
        features = clip.images.lower_copy()(image).flatten()  # a copy: the model may be in use by training
    return features.cpu()[torch.linspace(0, len(features) - 1, _PROBED).long()]


def check_probe(layout: Layout, found: Tensor, folder: Path) -> None:
    """Raise a CacheError if the `probe` of a model differs from that of a cache."""
    stored = torch.tensor(layout.probe, dtype=torch.float64)
    distance = relative_distance(found, stored) if found.shape == stored.shape else torch.inf
    if not distance <= PROBE_TOLERANCE[found.dtype]:
        raise CacheError(
            f"{folder}: this model computes other features from the same weights (relative distance {distance:.1e} on "
            "a probe): another activation, number of heads or hook below the cut. Build another cache with it."
        )


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in fp64."""
    found, expected = found.cpu().double(), expected.cpu().double()  # some devices have no fp64
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# ---- dataset ---------------------------------------------------------------------------------------------------------


def dataset_identity(dataset: Any, given: Any = None) -> dict[str, str | int]:
    """Return the entries of the identity of a cache that describe a dataset.

    `given` is text or a JSON value that identifies the dataset and its transform. Without it, digests of:

    - images: path below the common folder, size and modification time of each file; without files, the indices of a
      subset; the contents of tensors in memory; and the text `identity` of a dataset that has one;
    - labels;
    - image transform: its repr.

    An entry is "not listed" if the dataset does not list it.

    >>> dataset_identity([(torch.zeros(3, 2, 2), 1)], {"name": "zeros", "version": 2})
    {'number of images': 1, 'given identity': '{"name": "zeros", "version": 2}'}
    >>> list(dataset_identity([(torch.zeros(3, 2, 2), 1)]))
    ['number of images', 'given identity', 'images', 'labels', 'image transform']
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
    files = None if found.images is None else _with_file_status(found.images)
    listed = files is not None or found.contents
    return count | {
        "given identity": "none",
        "images": digest_json([files, found.contents]) if listed else "not listed",
        "labels": "not listed" if found.labels is None else digest_json(found.labels),
        "image transform": digest_json(found.transforms) if found.transforms else "none",
    }


class _Description(NamedTuple):
    """Description of a dataset, and of the datasets inside it."""

    images: list[str | int] | None  # path or index of each item; None if not listed
    labels: list[int] | None  # None if not listed
    transforms: list[str]  # reprs
    contents: list[str]  # of the images: digests of tensors, and the attribute `identity` of the dataset


def _describe(dataset: Any) -> _Description:
    if isinstance(dataset, ConcatDataset):
        parts = [_describe(part) for part in dataset.datasets]
        return _Description(
            _joined([part.images for part in parts]),
            _joined([part.labels for part in parts]),
            [str(part.transforms) for part in parts],
            list(chain.from_iterable(part.contents for part in parts)),
        )
    images, labels = _paths(dataset), _labels(dataset)
    names = ("transform", "target_transform") if hasattr(dataset, "transform") else ("transforms",)
    found = [value for name in names if (value := getattr(dataset, name, None)) is not None]
    transforms = [re.sub(" at 0x[0-9a-fA-F]+", "", repr(transform)) for transform in found]
    own = getattr(dataset, "identity", getattr(dataset, "_fingerprint", None))  # the latter: the library `datasets`
    contents = [own] if isinstance(own, str) else []
    if tensors := _tensors(dataset):
        contents.append(digest_tensors((str(number), tensor) for number, tensor in enumerate(tensors)))
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # such as torch.utils.data.Subset
        inner, indices = _describe(dataset.dataset), [int(index) for index in dataset.indices]
        if images is None:
            images = [index if inner.images is None else inner.images[index] for index in indices]
        if labels is None and inner.labels is not None:
            labels = [inner.labels[index] for index in indices]
        transforms += inner.transforms
        contents += inner.contents
    return _Description(images, labels, transforms, contents)


def _joined(parts: list[Any]) -> list[Any] | None:
    """Concatenate lists; None if one is not listed."""
    return None if any(part is None for part in parts) else list(chain.from_iterable(parts))


def _paths(dataset: Any) -> list[str | int] | None:
    """Return the path of each item from the first attribute that lists files, or None."""
    root = getattr(dataset, "root", "")
    for name in _PATH_ATTRIBUTES:
        entries = getattr(dataset, name, None)
        if not isinstance(entries, (list, tuple, np.ndarray)) or len(entries) == 0:
            continue
        in_pairs = isinstance(entries[0], (list, tuple))
        first = entries[0][0] if in_pairs and entries[0] else entries[0]
        if not isinstance(first, (str, Path)):
            continue
        for folder in (root if isinstance(root, (str, Path)) else "", ""):  # "": the working directory
            if os.path.isfile(os.path.join(folder, first)):
                return [os.path.join(folder, entry[0] if in_pairs else entry) for entry in entries]
    return None


def _labels(dataset: Any) -> list[int] | None:
    """Return the label of each item, or None unless the dataset lists one whole number for each without loading it."""
    listed = (getattr(dataset, name, None) for name in _LABEL_ATTRIBUTES)
    values: Any = next((value for value in listed if value is not None), None)
    if isinstance(dataset, TensorDataset):
        values = dataset.tensors[-1]
    try:
        if isinstance(dataset, (list, tuple)):
            values = [label for _, label in dataset]
        labels = [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]
        return labels if len(labels) == len(dataset) else None
    except (TypeError, ValueError, RuntimeError, OverflowError):  # not listed, or not numbers
        return None


def _tensors(dataset: Any) -> Sequence[Tensor]:
    """Return the images of a dataset in memory; empty for other datasets."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[:1]
    in_pairs = isinstance(dataset, (list, tuple)) and all(isinstance(x, (list, tuple)) and len(x) == 2 for x in dataset)
    return [image for image, _ in dataset if isinstance(image, Tensor)] if in_pairs else []


def _with_file_status(images: Sequence[str | int]) -> list[Any]:
    """Replace each path by [path below the common folder, size, modification time]."""
    paths = [os.path.abspath(image) for image in images if isinstance(image, str)]
    if not paths:
        return list(images)
    start = len(os.path.join(os.path.commonpath([os.path.dirname(path) for path in set(paths)]), ""))
    described: list[Any] = []
    for image in images:
        if isinstance(image, str):
            path = os.path.abspath(image)
            status = os.stat(path)
            described.append([path[start:].replace(os.sep, "/"), status.st_size, status.st_mtime_ns])
        else:
            described.append(image)
    return described
