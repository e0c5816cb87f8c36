"""Labelled images, in files or in a map-style dataset. Labels are known without loading an image."""

from __future__ import annotations

import copy
import os
import struct
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ..store import open_regular
from .base import InputError, SizedDataset
from .files import absolute_path

Transform = Callable[[Any], Any]
ImagesT = TypeVar("ImagesT", bound="Images")

# Raised by Pillow's decoders for truncated or invalid files.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
_UNREADABLE += (ArithmeticError, AttributeError, struct.error, zlib.error, Image.DecompressionBombError)
# Formats of `files.IMAGE_EXTENSIONS`, under any extension, and GIF: six .jpg files of Oxford-IIIT Pet are GIFs. Other
# formats are excluded: Pillow runs Ghostscript on PostScript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_DEEP_MODES = ("I", "F")  # and I;16…: Pillow clips values above 255, so most images would become white


class Images(Dataset):
    """Map-style dataset of (image, label) with a name for each image, from which subsets can be taken.

    Attributes:
        transform: Applied to every image, or None.
    """

    transform: Transform | None

    @property
    @abstractmethod
    def labels(self) -> list[int]:
        """Label of every image, without opening any."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Unique, permanent name of every image, such as its path from the root with "/"."""

    @abstractmethod
    def _with_items(self: ImagesT, indices: Sequence[int], labels: Sequence[int]) -> ImagesT:
        """Return the images at some indices, with the given labels."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self: ImagesT, indices: Iterable[int]) -> ImagesT:
        """Return some of the images, in the order of `indices`."""
        chosen, labels = list(indices), self.labels
        return self._with_items(chosen, [labels[index] for index in chosen])

    def subset_classes(self: ImagesT, classes: Sequence[int]) -> ImagesT:
        """Return the images of some classes, labelled from 0 in the order of `classes`."""
        new_label, labels = {label: position for position, label in enumerate(classes)}, self.labels
        chosen = [index for index, label in enumerate(labels) if label in new_label]
        return self._with_items(chosen, [new_label[labels[index]] for index in chosen])

    def with_transform(self: ImagesT, transform: Transform | None) -> ImagesT:
        """Return a copy with another transform."""
        images = copy.copy(self)
        images.transform = transform
        return images


class LabelledImages(Images):
    """Images in files below a folder: item i is (image, label), the image opened by Pillow as RGB.

    Photos are upright: the EXIF orientation is applied, which torchvision's loader ignores.

    Attributes:
        root: The folder.
        samples: (path, label) of every image, as in torchvision's `ImageFolder`.
        transform: Applied to every image, or None.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> Image.new("L", (3, 2)).save(folder + "/black.png")
        >>> images = LabelledImages(folder, ["black.png", "missing.png"], [7, 8])
        >>> image, label = images[0]
        >>> image.mode, image.size, label
        ('RGB', (3, 2), 7)
        >>> images.subset([1]).labels  # nothing is opened
        [8]
    """

    def __init__(
        self, root: str | Path, paths: Sequence[str], labels: Sequence[int], transform: Transform | None = None
    ):
        if len(paths) != len(labels):
            raise ValueError(f"LabelledImages: labels must have one item per path, {len(paths)}; got {len(labels)}.")
        self.root = absolute_path(root)
        self.samples = [(os.path.join(self.root, path), label) for path, label in zip(paths, labels, strict=True)]
        self.transform = transform

    @property
    def labels(self) -> list[int]:
        """Labels of `samples`."""
        return [label for _, label in self.samples]

    @property
    def names(self) -> list[str]:
        """Paths relative to the root, with "/"."""
        start = len(os.path.join(self.root, ""))
        return [path[start:].replace(os.sep, "/") for path, _ in self.samples]

    def _with_items(self, indices: Sequence[int], labels: Sequence[int]) -> LabelledImages:
        part = copy.copy(self)
        part.samples = [(self.samples[index][0], label) for index, label in zip(indices, labels, strict=True)]
        return part

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Load an image and its label.

        Raises:
            InputError: If the file is missing or can't be read as an image.
        """
        path, label = self.samples[index]
        image = read_image(path, listed=True)
        return image if self.transform is None else self.transform(image), label


def read_image(path: str | Path, *, listed: bool = False) -> Image.Image:
    """Read an image file as RGB, upright by its EXIF orientation; of an animation, the first frame.

    Args:
        path: The file.
        listed: The file existed when its dataset was opened, for the error message.

    Raises:
        InputError: If the file is missing, is not an image, is damaged, or has more than 8 bits per channel.
    """
    try:
        with open_regular(path) as file:
            return decode_image(file, path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file. " + ("It was there when the dataset was opened." if listed else "Correct the path.")
        ) from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Replace or remove the file.") from error


def decode_image(file: BinaryIO, path: str | Path) -> Image.Image:
    """Read an opened image file as `read_image` does; `path` is its name in error messages."""
    try:
        opened = Image.open(file, formats=_FORMATS)
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    with opened as image:
        return to_rgb(image, path)


def to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Convert an image to RGB as `read_image` does; `name` is its name in error messages."""
    if image.mode.partition(";")[0] in _DEEP_MODES:
        raise InputError(f"{name}: has more than 8 bits per channel (mode {image.mode}), and RGB has 8. Convert it.")
    try:
        image.load()  # PNG has its EXIF data behind the pixels
        return upright(image).convert("RGB")
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error


def upright(image: Image.Image) -> Image.Image:
    """Return an image rotated and mirrored by its EXIF orientation; the same image if it has none."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except _UNREADABLE:  # invalid EXIF data
        return image


def _unreadable(name: str | Path, error: Exception) -> InputError:
    why = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, UnidentifiedImageError):
        why = f"not {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
    return InputError(f"{name}: can't be read as an image ({why}). Replace or remove it.")


class DatasetImages(Images):
    """Items of a map-style dataset, with labels and names.

    Args:
        dataset: Map-style dataset of (image, label).
        labels: Label of each item; default: `read_labels(dataset)`.
        names: Name of each item; default: its index.
        transform: Applied to every image that is not a tensor; tensors come from the dataset's own transform.

    Example:
        >>> images = DatasetImages([("a", 3), ("b", 4), ("c", 3)], transform=str.upper)
        >>> [images.subset_classes([3])[item] for item in range(2)]
        [('A', 0), ('C', 0)]
        >>> images.subset_classes([4]).names
        ['1']
    """

    def __init__(
        self,
        dataset: SizedDataset,
        labels: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        transform: Transform | None = None,
    ):
        self.dataset, self.transform = dataset, transform
        self._labels = read_labels(dataset) if labels is None else list(labels)
        self._names = list(map(str, range(len(dataset)))) if names is None else list(names)
        self.indices = list(range(len(dataset)))
        if not len(self._labels) == len(self._names) == len(dataset):
            raise ValueError(
                f"DatasetImages: labels and names must have one item per item of the dataset, {len(dataset)}; got "
                f"{len(self._labels)} and {len(self._names)}."
            )

    @property
    def labels(self) -> list[int]:
        """Label of every item."""
        return self._labels

    @property
    def names(self) -> list[str]:
        """Name of every item."""
        return self._names

    def _with_items(self, indices: Sequence[int], labels: Sequence[int]) -> DatasetImages:
        part = copy.copy(self)
        part._labels, part._names = list(labels), [self._names[index] for index in indices]
        part.indices = [self.indices[index] for index in indices]
        return part

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, _ = self.dataset[self.indices[index]]
        if isinstance(image, Image.Image):
            image = upright(image)
        if self.transform is not None and not isinstance(image, Tensor):
            image = self.transform(image)
        return image, self._labels[index]


def joined(parts: Sequence[Images]) -> Images:
    """Join images; if two have the same name, the number of the part is prefixed to all names.

    >>> joined([DatasetImages([("a", 3)]), DatasetImages([("b", 4)])]).names
    ['0/0', '1/0']
    """
    names = [name for part in parts for name in part.names]
    if len(set(names)) < len(names):
        names = [f"{number}/{name}" for number, part in enumerate(parts) for name in part.names]
    return DatasetImages(ConcatDataset(parts), [label for part in parts for label in part.labels], names)


def read_labels(dataset: Any) -> list[int]:
    """Return the label of every item of a dataset.

    Labels are read from the attribute `labels` or `targets`, as torchvision's datasets have. Without them, every item
    is loaded.

    Raises:
        InputError: If an item has no label, or one that is not an integer.

    Example:
        >>> read_labels([("an image", 2), ("another", 0)])
        [2, 0]
    """
    name = type(dataset).__name__
    attributes = (getattr(dataset, attribute, None) for attribute in ("labels", "targets", "_labels"))
    found = next((values for values in attributes if values is not None), None)
    if found is None:
        found = [dataset[index][1] for index in range(len(dataset))]
    values = found.tolist() if hasattr(found, "tolist") else list(found)
    labels = [value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value for value in values]
    for index, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int):
            raise InputError(
                f"{name}: the label of item {index} must be an integer; got {label!r}. Number the classes from 0."
            )
    if len(labels) != len(dataset):
        raise InputError(f"{name}: {len(dataset)} items have {len(labels)} labels. Give each item one.")
    return labels
