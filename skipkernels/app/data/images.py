"""Labelled images, in files or in a map-style dataset. Labels are known without loading an image."""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .base import InputError
from .files import absolute_path
from .map_style import SizedDataset, image_and_label, read_labels
from .reading import from_pixels, read_image, to_rgb

Transform = Callable[[Any], Any]


class ImageFiles:
    """Image files below a folder, in `paths`: item i is (image, label), as `read_image` reads it."""

    def __init__(self, root: str | Path, names: Sequence[str], labels: Sequence[int]):
        folder = absolute_path(root)
        self.paths, self.labels = [os.path.join(folder, name) for name in names], labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index]), self.labels[index]


class Images:
    """Items of a map-style dataset with labels and names, from which subsets can be taken.

    Images of Pillow and uint8 arrays are converted as in `read_image`.

    Args:
        dataset: Map-style dataset of (image, label), or of {"image": image, "label": label}.
        labels: Label of each item; default: `read_labels(dataset)`.
        names: Unique, permanent name of each item, such as its path from the root with "/"; default: its index.
        transform: Applied to every image that is not a tensor; tensors come from the dataset's own transform.

    Attributes:
        labels: Label of every image; no image is opened for it.
        names: Name of every image.
        transform: Applied to every image, or None.
        identity: Text that identifies the images in place of their files and contents, or None.

    Example:
        >>> images = Images([("a", 3), ("b", 4), ("c", 3)], transform=str.upper)
        >>> [images.subset_classes([3])[item] for item in range(2)]
        [('A', 0), ('C', 0)]
    """

    identity: str | None = None

    def __init__(
        self,
        dataset: SizedDataset,
        labels: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        transform: Transform | None = None,
    ):
        self.labels = read_labels(dataset) if labels is None else list(labels)
        self.names = list(map(str, range(len(dataset))) if names is None else names)
        self.dataset, self.indices, self.transform = dataset, list(range(len(dataset))), transform
        self._own_labels = self.labels if labels is None else None  # of all items, to compare with each item
        if not len(self.labels) == len(self.names) == len(dataset):
            raise ValueError(
                f"Images: labels and names must have one item per item of the dataset, {len(dataset)}; got "
                f"{len(self.labels)} and {len(self.names)}."
            )

    @classmethod
    def of_files(cls, root: str | Path, paths: Sequence[str], labels: Sequence[int]) -> Images:
        """Return images in files below a folder.

        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> Image.new("L", (3, 2)).save(folder + "/black.png")
        >>> images = Images.of_files(folder, ["black.png", "missing.png"], [7, 8])
        >>> image, label = images[0]
        >>> image.mode, image.size, label, images.subset([1]).labels  # of the other, nothing is opened
        ('RGB', (3, 2), 7, [8])
        """
        return cls(ImageFiles(root, paths, labels), labels, paths)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Load an image and its label."""
        image, label = image_and_label(self.dataset, self.indices[index])
        self._check_label(self.indices[index], label)
        image = _converted(image, f"image {self.names[index]}")
        is_tensor = hasattr(image, "untyped_storage")  # without torch, which a check of files does not import
        if self.transform is not None and not is_tensor:
            image = self.transform(image)
        return image, self.labels[index]

    def _check_label(self, item: int, label: Any) -> None:
        """Raise an InputError unless an item has the label that was read from its dataset before."""
        if self._own_labels is not None and label != self._own_labels[item]:
            raise InputError(
                f"{type(self.dataset).__name__}: item {item} has the label {label!r}, and the labels of the dataset "
                f"have {self._own_labels[item]}. Make them equal.",
                "dataset",
            )

    def each(self, use: Callable[[Any], Any]) -> Iterator[Any]:
        """Read the images in order, in threads if they are files; yield results of `use`, or an InputError."""
        used = self.with_transform(use)
        workers = None if isinstance(self.dataset, ImageFiles) else 1
        for index, result in enumerate(read_ahead(lambda n: used[n][0], len(self), workers=workers)):
            if isinstance(result, InputError):
                if result.argument is not None:  # about the label, not about the image
                    raise result
            elif isinstance(result, Exception):  # from a dataset of the user
                result = InputError(f"{self.names[index]}: {result!r}")
            yield result

    def subset(self, indices: Iterable[int]) -> Images:
        """Return some of the images, in the order of `indices`."""
        part, chosen = copy.copy(self), list(indices)
        part.labels, part.names = [self.labels[index] for index in chosen], [self.names[index] for index in chosen]
        part.indices = [self.indices[index] for index in chosen]
        return part

    def subset_classes(self, labels: Sequence[int]) -> Images:
        """Return the images of some classes, labelled from 0 in the order of `labels`."""
        new_label = {label: position for position, label in enumerate(labels)}
        part = self.subset(index for index, label in enumerate(self.labels) if label in new_label)
        part.labels = [new_label[label] for label in part.labels]
        return part

    def with_transform(self, transform: Transform | None) -> Images:
        """Return a copy with another transform."""
        images = copy.copy(self)
        images.transform = transform
        return images


def _converted(image: Any, name: str) -> Any:
    """Convert an image of Pillow or a uint8 array to RGB; other images are returned as they are."""
    if isinstance(image, np.ndarray):
        return from_pixels(image, name)
    return to_rgb(image, name) if isinstance(image, Image.Image) else image


def joined(parts: Sequence[Images]) -> Images:
    """Join images; if two have the same name, the number of the part is prefixed to all names.

    >>> joined([Images([("a", 3)]), Images([("b", 4)])]).names
    ['0/0', '1/0']
    """
    names = [name for part in parts for name in part.names]
    if len(set(names)) < len(names):
        names = [f"{number}/{name}" for number, part in enumerate(parts) for name in part.names]
    from torch.utils.data import ConcatDataset

    both: Any = ConcatDataset(parts)  # type: ignore[arg-type]  # any sequence is accepted
    return Images(both, [label for part in parts for label in part.labels], names)


def read_ahead(
    read: Callable[[int], Any], count: int, *, workers: int | None = None, ahead: int = 256
) -> Iterator[Any]:
    """Yield the results of read(0), read(1), …, or their errors, computed in threads up to `ahead` before their use.

    `workers` is the number of threads, by default one for each core, at most 8.
    """

    def attempt(index: int) -> Any:
        try:
            return read(index)
        except Exception as error:  # of any dataset
            return error

    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    pending = deque(pool.submit(attempt, index) for index in range(min(ahead, count)))
    try:
        for index in range(count):
            yield pending.popleft().result()
            if index + ahead < count:
                pending.append(pool.submit(attempt, index + ahead))
    finally:  # without waiting: this generator may be collected in one of these threads
        for reading in pending:  # `cancel_futures` fails at the exit of the process
            reading.cancel()
        pool.shutdown(wait=False)
