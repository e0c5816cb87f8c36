"""Images with labels: of files, or picked from any dataset; their labels are known without opening one."""

from __future__ import annotations

import copy
import os
import struct
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from ..store import open_regular
from .base import InputError, SizedDataset
from .files import absolute

Transform = Callable[[Any], Any]
Same = TypeVar("Same", bound="Images")

# What Pillow's decoders raise for a file that is cut short or of another kind than it says.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
_UNREADABLE += (ArithmeticError, AttributeError, struct.error, zlib.error, Image.DecompressionBombError)
# Formats of `files.IMAGE_ENDINGS`, whatever the ending of a file is, and GIF: six files of Oxford-IIIT Pet that are
# called .jpg are GIFs. Not Pillow's others: it runs Ghostscript on PostScript.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_DEEP_MODES = ("I", "F")  # and I;16 and its kin: Pillow cuts what is over 255, so that most of the image turns white


class Images(Dataset):
    """Map-style (image, label) with a name for each image, from which parts can be taken.

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
        """What tells an image from the others and stays the same: its path from the root, with "/"."""

    @abstractmethod
    def _part(self: Same, indices: Sequence[int], labels: Sequence[int]) -> Same:
        """Some of the images, with other labels."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self: Same, indices: Iterable[int]) -> Same:
        """Some of the images, in this order."""
        chosen, labels = list(indices), self.labels
        return self._part(chosen, [labels[index] for index in chosen])

    def of_classes(self: Same, classes: Sequence[int]) -> Same:
        """The images of some classes, labelled from 0 in the order of `classes`."""
        place, labels = {label: position for position, label in enumerate(classes)}, self.labels
        chosen = [index for index, label in enumerate(labels) if label in place]
        return self._part(chosen, [place[labels[index]] for index in chosen])

    def with_transform(self: Same, transform: Transform | None) -> Same:
        """The same images, with another transform."""
        same = copy.copy(self)
        same.transform = transform
        return same


class LabelledImages(Images):
    """Images in files below a folder: item i is (image, label), the image opened by Pillow as RGB.

    An image is as the file has it: a camera's note that it was held sideways (EXIF) is not followed, as torchvision's
    loader and the training of CLIPs don't.

    Args:
        root: The folder.
        paths: Of the images, from the root.
        labels: Of the images.
        transform: Applied to every image.

    Attributes:
        root: The folder.
        samples: (path, label) of every image, as torchvision's `ImageFolder` has them.
        transform: Applied to every image, or None.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> Image.new("L", (3, 2)).save(folder + "/black.png")
        >>> images = LabelledImages(folder, ["black.png", "gone.png"], [7, 8])
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
            raise ValueError(
                f"LabelledImages: labels must be as many as paths, {len(paths)}; got {len(labels)}. Give one each."
            )
        self.root = absolute(root)
        self.samples = [(os.path.join(self.root, path), label) for path, label in zip(paths, labels, strict=True)]
        self.transform = transform

    @property
    def labels(self) -> list[int]:
        """Of `samples`."""
        return [label for _, label in self.samples]

    @property
    def names(self) -> list[str]:
        """Paths from the root, with "/"."""
        start = len(os.path.join(self.root, ""))
        return [path[start:].replace(os.sep, "/") for path, _ in self.samples]

    def _part(self, indices: Sequence[int], labels: Sequence[int]) -> LabelledImages:
        part = copy.copy(self)
        part.samples = [(self.samples[index][0], label) for index, label in zip(indices, labels, strict=True)]
        return part

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """An image and its label.

        Raises:
            InputError: If the file is not there or can't be read as an image; names it.
        """
        path, label = self.samples[index]
        image = read_image(path)
        return image if self.transform is None else self.transform(image), label


def read_image(path: str | Path) -> Image.Image:
    """An image file as RGB; the first frame of an animation.

    Raises:
        InputError: If it is not there, is no image file, is damaged, or has more than 8 bits a channel; names it.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=_FORMATS) as image:
            deep = image.mode.partition(";")[0] in _DEEP_MODES
            if not deep:
                return image.convert("RGB")
            mode = image.mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such file any more. It was there when the dataset was read.") from None
    except _UNREADABLE as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, UnidentifiedImageError):
            why = f"not {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        raise InputError(f"{path}: can't be read as an image ({why}). Replace or remove the file.") from error
    raise InputError(f"{path}: has more than 8 bits a channel (mode {mode}), and RGB has 8. Convert the file.")


class PickedImages(Images):
    """Some items of a dataset, with labels of one's own.

    Args:
        dataset: Map-style of (image, label).
        labels: Of the items of `dataset`; by default found out by `labels_of`.
        names: Of the items; by default their numbers.
        transform: Applied to every image that isn't a tensor: one that is has been through the dataset's own.

    Example:
        >>> images = PickedImages([("a", 3), ("b", 4), ("c", 3)], transform=str.upper)
        >>> [images.of_classes([3])[item] for item in range(2)]
        [('A', 0), ('C', 0)]
        >>> images.of_classes([4]).names
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
        self._labels = labels_of(dataset) if labels is None else list(labels)
        self._names = list(map(str, range(len(dataset)))) if names is None else list(names)
        self.indices = list(range(len(dataset)))
        if not len(self._labels) == len(self._names) == len(dataset):
            raise ValueError(
                f"PickedImages: labels and names must be as many as the items of the dataset, {len(dataset)}; got "
                f"{len(self._labels)} and {len(self._names)}. Give one each."
            )

    @property
    def labels(self) -> list[int]:
        """Of the items that were picked."""
        return self._labels

    @property
    def names(self) -> list[str]:
        """Of the items that were picked."""
        return self._names

    def _part(self, indices: Sequence[int], labels: Sequence[int]) -> PickedImages:
        part = copy.copy(self)
        part._labels, part._names = list(labels), [self._names[index] for index in indices]
        part.indices = [self.indices[index] for index in indices]
        return part

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, _ = self.dataset[self.indices[index]]
        done = self.transform is None or isinstance(image, Tensor)
        return image if done else self.transform(image), self._labels[index]  # type: ignore[misc]


def labels_of(dataset: Any) -> list[int]:
    """The label of every item of a dataset.

    They are read from its attribute `labels` or `targets`, in which torchvision's datasets and those of most people
    have them. Without one every item is loaded.

    Raises:
        InputError: If there is not a whole number for every item.

    Example:
        >>> labels_of([("an image", 2), ("another", 0)])
        [2, 0]
    """
    where = type(dataset).__name__
    attributes = (getattr(dataset, name, None) for name in ("labels", "targets", "_labels"))
    found = next((values for values in attributes if values is not None), None)
    if found is None:
        found = [dataset[index][1] for index in range(len(dataset))]
    values = found.tolist() if hasattr(found, "tolist") else list(found)
    labels = [value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value for value in values]
    for index, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int):
            raise InputError(
                f"{where}: the label of item {index} must be a whole number; got {label!r}. Number the classes from 0."
            )
    if len(labels) != len(dataset):
        raise InputError(f"{where}: it has {len(dataset)} items, and labels of {len(labels)}. Give each item one.")
    return labels
