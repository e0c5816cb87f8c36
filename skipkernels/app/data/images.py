"""Labelled images, in files or in a map-style dataset. Labels are known without loading an image."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import struct
import threading
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from ...checks import whole_number
from ...store import open_regular
from .base import InputError, SizedDataset
from .files import HEAD, absolute_path, image_format

Transform = Callable[[Any], Any]
ImagesT = TypeVar("ImagesT", bound="Images")

# Raised by Pillow's decoders for truncated or invalid files.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
_UNREADABLE += (ArithmeticError, AttributeError, struct.error, zlib.error, Image.DecompressionBombError, MemoryError)
_UNREADABLE += (RuntimeError,)  # of libavif
# Under any extension: six .jpg files of Oxford-IIIT Pet are GIFs. Others are excluded: Pillow runs Ghostscript on EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
_PLUGINS = {"HEIF": "pip install 'skipkernels[heif]'", "AVIF": "pip install --upgrade pillow"}
MAX_PIXELS = 178_956_970  # 0.7 GB as RGB, which Pillow stores in 4 bytes; also Pillow's limit of an image
# glibc returns freed blocks above 32 MB to the system. Of smaller ones each thread keeps its own: one image of
# MAX_PIXELS after another, in eight threads, left 6.7 GB.
_LARGE, _LARGE_BLOCK = MAX_PIXELS // 16, 1 << 26
_RESIZED = 512  # pixels of the shorter side after resizing, for the size of the result; models have 224 to 448


class PixelBudget:
    """Number of pixels that the threads of a process decode and resize at the same time."""

    def __init__(self, pixels: int = MAX_PIXELS):
        self._free, self._changed = pixels, threading.Condition()

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until this number of pixels is free, and take it."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_budget = PixelBudget()
if hasattr(os, "register_at_fork"):  # a thread that holds pixels does not exist in the new process
    os.register_at_fork(after_in_child=_budget.__init__)  # type: ignore[misc]


class Images(Dataset):
    """Map-style dataset of (image, label) with a name for each image, from which subsets can be taken."""

    transform: Transform | None  # Applied to every image, or None

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
    """Images in files below a folder: item i is (image, label), the image opened by Pillow as RGB, upright by its EXIF.

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
        # (path, label) of every image, as in torchvision's `ImageFolder`
        self.samples = [(os.path.join(self.root, path), label) for path, label in zip(paths, labels, strict=True)]
        self.transform = transform  # Applied to every image, or None

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
        """Load an image and its label."""
        path, label = self.samples[index]
        return read_image(path, self.transform, listed=True), label


def read_image(path: str | Path, transform: Transform | None = None, *, listed: bool = False) -> Any:
    """Read an image file as RGB, upright by its EXIF orientation; of an animation, the first frame.

    Transparency is dropped, and 16-bit values keep their upper 8 bits. The pixels count as in use until `transform`
    returns. `listed` is for the message: the file existed when its dataset was opened.

    Raises:
        InputError: If the file is missing, is not an image, is damaged, or has too many pixels.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file. "
            + ("The dataset lists it: was it removed, or is it a broken link?" if listed else "Correct the path.")
        ) from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Replace or remove the file.") from error
    with file:
        return decode_image(file, path, transform)


def decode_image(file: BinaryIO, name: str | Path, transform: Transform | None = None) -> Any:
    """Read an opened image file as `read_image` does; `name` is its name in error messages."""
    Image.init()
    kind = None
    try:
        kind = image_format(file.read(HEAD))
        file.seek(0)
        if kind == "HEIF" and kind not in Image.OPEN:
            with contextlib.suppress(ImportError):
                importlib.import_module("pillow_heif").register_heif_opener()
        opened = Image.open(file, formats=[each for each in FORMATS if each in Image.OPEN and kind in (None, each)])
    except _UNREADABLE as error:
        if kind in _PLUGINS and kind not in Image.OPEN:
            raise InputError(f"{name}: a {kind} image needs a package: {_PLUGINS[kind]}.") from error
        raise _unreadable(name, error) from error
    with opened as image:
        return to_rgb(image, name, transform)


def to_rgb(image: Image.Image, name: str | Path, transform: Transform | None = None) -> Any:
    """Convert an image to RGB as `read_image` does, and transform it; `name` is its name in error messages."""
    width, height = image.size
    if getattr(image, "tile", None) and image.format not in (*FORMATS, "MPO"):  # not decoded yet
        raise InputError(f"{name}: is {image.format}, not {_listed(FORMATS)}. Convert it.")
    if image.mode in ("I", "F") and image.format not in ("PNG", "PPM"):  # Pillow reads 16 bits of these as I
        raise InputError(
            f"{name}: has 32 bits per channel (mode {image.mode}), without a defined white. Convert it to 8 or 16 bits."
        )
    # Upwards: a line of 2,000,000 × 5 pixels is resized to 89,600,000 × 224.
    pixels = max(width * height, _RESIZED**2 * max(width, height) // max(1, min(width, height)))
    if pixels > MAX_PIXELS:
        raise InputError(
            f"{name}: must have at most {MAX_PIXELS:,} pixels, also with its shorter side resized to {_RESIZED}; got "
            f"{width:,} × {height:,}. Crop or remove it."
        )
    if pixels > _LARGE:
        Image.core.set_block_size(_LARGE_BLOCK)
    with _budget.hold(pixels):
        try:
            image.load()  # PNG has its EXIF data behind the pixels
            image = upright(image)
            if image.mode[0] == "I":
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if isinstance(image.info.get("transparency"), bytes):  # Pillow warns otherwise
                image = image.convert("RGBA")
            if image.mode != "RGB":
                image = image.convert("RGB")
        except _UNREADABLE as error:
            raise _unreadable(name, error) from error
        try:
            return image if transform is None else transform(image)
        except MemoryError as error:
            raise _unreadable(name, error) from error


def upright(image: Image.Image) -> Image.Image:
    """Return an image rotated and mirrored by its EXIF orientation; the same image if it has none."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except MemoryError:
        raise
    except _UNREADABLE:  # invalid EXIF data
        return image


def _unreadable(name: str | Path, error: Exception) -> InputError:
    why = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    if isinstance(error, UnidentifiedImageError):
        why = f"not {_listed(FORMATS)}"
    return InputError(f"{name}: can't be read as an image ({why}). Replace or remove it.")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


class DatasetImages(Images):
    """Items of a map-style dataset, with labels and names. Pillow's images are converted as `read_image` does.

    Args:
        dataset: Map-style dataset of (image, label), or of {"image": image, "label": label}.
        labels: Label of each item; default: `read_labels(dataset)`.
        names: Name of each item; default: its index.
        transform: Applied to every image that is not a tensor; tensors come from the dataset's own transform.

    Example:
        >>> images = DatasetImages([("a", 3), ("b", 4), ("c", 3)], transform=str.upper)
        >>> [images.subset_classes([3])[item] for item in range(2)]
        [('A', 0), ('C', 0)]
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
        self._own_labels = self._labels if labels is None else None  # of all items, to compare with each item
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
        item = self.indices[index]
        image, label = _image_and_label(self.dataset, item)
        if self._own_labels is not None and label != self._own_labels[item]:
            raise InputError(
                f"{type(self.dataset).__name__}: item {item} has the label {label!r}, and the labels of the dataset "
                f"have {self._own_labels[item]}. Make them equal.",
                "dataset",
            )
        if isinstance(image, Image.Image):
            image = to_rgb(image, f"image {self._names[index]}", self.transform)
        elif self.transform is not None and not isinstance(image, Tensor):
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


def _image_and_label(dataset: Any, index: int) -> tuple[Any, Any]:
    """Return the image and the label of an item; a label of NumPy or PyTorch as a number."""
    item = dataset[index]
    if isinstance(item, Mapping) and "image" in item and "label" in item:
        item = item["image"], item["label"]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        got = f"the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
        raise InputError(
            f"{type(dataset).__name__}: item {index} must be (image, label), or have the keys image and label; got "
            f"{got}. Rename or convert them."
        )
    image, label = item
    return image, label.item() if hasattr(label, "item") and getattr(label, "ndim", 0) == 0 else label


def read_labels(dataset: Any) -> list[int]:
    """Return the label of every item of a dataset.

    Labels are read from the attribute `labels` or `targets`, as torchvision's datasets have, or from the column "label"
    of a dataset of Hugging Face. Without them, every item is loaded.

    >>> read_labels([("an image", 2), ("another", 0)])
    [2, 0]
    """
    name = type(dataset).__name__
    attributes = (getattr(dataset, attribute, None) for attribute in ("labels", "targets", "_labels"))
    found = next((values for values in attributes if values is not None), None)
    if found is None and "label" in (getattr(dataset, "column_names", None) or ()):
        found = dataset["label"]
    if found is None:
        found = [_image_and_label(dataset, index)[1] for index in range(len(dataset))]
    values = found.tolist() if hasattr(found, "tolist") else list(found)
    labels = []
    for index, value in enumerate(values):
        label = whole_number(value)
        if label is None:
            raise InputError(
                f"{name}: the label of item {index} must be an integer; got {value!r}. Number the classes from 0."
            )
        labels.append(label)
    if len(labels) != len(dataset):
        raise InputError(f"{name}: {len(dataset)} items have {len(labels)} labels. Give each item one.")
    return labels
