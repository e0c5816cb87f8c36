"""Identification of the dataset of a cache: a key from the caller, or its files, labels, transform and some images.

docs/cache.md lists the changes that this detects.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import ConcatDataset, TensorDataset

from ..digests import digest_json
from ..store import Layout, StoreError
from .image_batches import Batch, load_batches

# Attributes that list the files of a dataset, as paths or (path, label), absolute or relative to `root`: those of
# torchvision's ImageFolder and similar datasets, then private ones of other torchvision datasets.
_PATH_ATTRIBUTES = ("samples", "imgs", "paths", "names", "_samples", "_image_files", "_images")
_LABEL_ATTRIBUTES = ("labels", "targets", "_labels")

_SPREAD = 6  # sampled images besides the first and the last
_GOLDEN = 0.6180339887498949  # golden ratio − 1: its multiples modulo 1 are spread evenly, however many there are
_BLOCKS = 8  # a sampled image is summarised by the means of 8 × 8 blocks
# Tolerance of the numbers of a sampled image, relative to the largest: above the difference between versions of an
# image library, below a change of the transform. Measured at 224 × 224 on noise with the spectrum of a photograph:
# pixels that differ by 1 of 255 change a number by at most 0.0016, bilinear instead of bicubic resizing by 0.017, JPEG
# of quality 95 by 0.018, a shift by 8 pixels by 0.15.
_SAMPLE_TOLERANCE = 5e-3


def dataset_key(dataset: Any, key: Any = None) -> dict[str, str]:
    """Return the entries of a fingerprint that describe a dataset.

    `key` is text or a JSON value that identifies the dataset and its transform. Without it, the entries are digests of

    - the files: path below the common folder, size and modification time; without files, the indices of a subset; and
      the text `fingerprint` of a dataset that has one;
    - the labels;
    - the repr of the transform.

    An entry is "not listed" if the dataset does not list it.

    >>> dataset_key([(torch.zeros(3, 2, 2), 1)], key={"name": "zeros", "version": 2})
    {'dataset key': '{"name": "zeros", "version": 2}'}
    >>> list(dataset_key([(torch.zeros(3, 2, 2), 1)]))
    ['dataset key', 'images', 'labels', 'image transform']
    """
    if key is not None:
        try:
            return {"dataset key": json.dumps(key, sort_keys=True, allow_nan=False)}
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"FeatureCache: key must be text or a JSON value; got {key!a:.200} ({error}).") from None
    images, labels, transforms, fingerprints = _describe(dataset)
    files: list[Any] | None = None if images is None else _with_file_status(images)
    if fingerprints:
        files = [files, fingerprints]
    return {
        "dataset key": "not given",
        "images": "not listed" if files is None else digest_json(files),
        "labels": "not listed" if labels is None else digest_json(labels),
        "image transform": digest_json(transforms) if transforms else "none",
    }


class _Description(NamedTuple):
    """Description of a dataset, and of the datasets inside it."""

    images: list[str | int] | None  # path or index of each item; None if not listed
    labels: list[int] | None  # None if not listed
    transforms: list[str]  # reprs
    fingerprints: list[str]  # of the images, by the dataset itself: its attribute `fingerprint`


def _describe(dataset: Any) -> _Description:
    if isinstance(dataset, ConcatDataset):
        parts = [_describe(part) for part in dataset.datasets]
        return _Description(
            _joined([part.images for part in parts]),
            _joined([part.labels for part in parts]),
            [str(part.transforms) for part in parts],
            list(chain.from_iterable(part.fingerprints for part in parts)),
        )
    images, labels = _paths(dataset), _labels(dataset)
    names = ("transform", "target_transform") if hasattr(dataset, "transform") else ("transforms",)
    found = [value for name in names if (value := getattr(dataset, name, None)) is not None]
    transforms = [re.sub(" at 0x[0-9a-fA-F]+", "", repr(transform)) for transform in found]
    fingerprint = getattr(dataset, "fingerprint", getattr(dataset, "_fingerprint", None))  # the latter: `datasets`
    fingerprints = [fingerprint] if isinstance(fingerprint, str) else []
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # such as torch.utils.data.Subset
        inner, indices = _describe(dataset.dataset), [int(index) for index in dataset.indices]
        if images is None:
            images = [index if inner.images is None else inner.images[index] for index in indices]
        if labels is None and inner.labels is not None:
            labels = [inner.labels[index] for index in indices]
        transforms += inner.transforms
        fingerprints += inner.fingerprints
    return _Description(images, labels, transforms, fingerprints)


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


def sample_images(dataset: Any, seed: int, workers: int = 0) -> list[dict[str, Any]]:
    """Summarise the first item, the last, and six between, transformed as in view 0 of a build.

    With `workers`, items are loaded in another process, so that the dataset opens no files in this one.
    """
    count = len(dataset)
    items = sorted({0, count - 1} | {int(count * (number * _GOLDEN % 1)) for number in range(1, _SPREAD + 1)})
    rows = [[item] for item in items * 2]  # each twice: the second time must give the same image
    found = [_summary(batch) for batch in load_batches(dataset, rows, seed=seed, workers=min(workers, 1))]
    found, again = found[: len(items)], found[len(items) :]
    for first, second in zip(found, again, strict=True):
        if not _alike(first, second):
            raise StoreError(
                f"FeatureCache: item {first['item']} of the dataset differs each time it is loaded, although the "
                "generators of PyTorch, NumPy and Python are seeded the same. Use these for random numbers, or pass "
                "`key`: a text that you change when the images or the transform change."
            )
    return found


def _summary(batch: Batch) -> dict[str, Any]:
    """Summarise a batch of one item: label; mean, standard deviation and means of blocks of each channel."""
    image = batch.images[0].double()
    blocks = adaptive_avg_pool2d(image, _BLOCKS)
    numbers = torch.cat([image.mean((1, 2)), image.std((1, 2), correction=0), blocks.flatten()])
    short = [float(f"{number:.5g}") for number in numbers.tolist()]
    return {"item": batch.rows[0], "label": int(batch.labels[0]), "numbers": short}


def _alike(stored: dict[str, Any], found: dict[str, Any]) -> bool:
    """Return True if two summaries have the same item and label, and equal numbers up to the tolerance."""
    before, now = (torch.tensor(summary["numbers"], dtype=torch.float64) for summary in (stored, found))
    tolerance = _SAMPLE_TOLERANCE * before.nan_to_num().abs().max().item()
    same = before.shape == now.shape and torch.allclose(now, before, rtol=0, atol=tolerance, equal_nan=True)
    return same and (stored["item"], stored["label"]) == (found["item"], found["label"])


def check_samples(layout: Layout, found: list[dict[str, Any]], folder: Path) -> None:
    """Raise a StoreError that names the first item with another summary than in the manifest of a store."""
    remedy = "Build another cache, or replace this one with `overwrite=True`."
    try:
        pairs = list(zip(layout.notes["samples"], found, strict=True))
        wrong = next((now["item"] for before, now in pairs if not _alike(before, now)), None)
    except (KeyError, TypeError, ValueError, RuntimeError):
        raise StoreError(f"{folder}: its manifest has no samples that fit this dataset. {remedy}") from None
    if wrong is not None:
        raise StoreError(
            f"{folder}: item {wrong} of the dataset has another image or label than when the cache was built: the "
            f"images, the code of the transform, or data that it reads has changed. {remedy}"
        )
