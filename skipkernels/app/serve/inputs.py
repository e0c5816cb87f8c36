"""Arguments of `Classifier.predict`: images of each kind as tensors, and checks of the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..data import InputError
from ..data.files import expanded, find_images
from ..data.reading import from_pixels, read_image, to_rgb

ImageInput = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path, an image of Pillow, a uint8 array [H, W], [H, W, 3] (RGB) or [H, W, 4], or a uint8 tensor [3, H, W]."""
_PREDICT = "Classifier.predict"


def named_images(
    images: ImageInput | Iterable[ImageInput], transform: Callable[[Any], Tensor]
) -> tuple[list[str], Callable[[int], Tensor]]:
    """Return the names of images, and the function that returns one of them preprocessed, [3, H, W]."""
    if isinstance(images, Tensor) and images.is_floating_point():
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                "must be [N, 3, H, W], preprocessed by classifier.transform, or of "
                f"uint8; got {images.dtype} {list(images.shape)}.",
                "images",
                _PREDICT,
            )
        return list(map(str, range(len(images)))), images.__getitem__
    listed = _listed(images)
    names = [str(each if isinstance(each, (str, os.PathLike)) else n) for n, each in enumerate(listed)]
    return names, lambda number: transform(_opened(listed[number], f"image {number}"))


def _listed(images: Any) -> list[Any]:
    """Return a list of images: those of a folder, a single one, or several."""
    if isinstance(images, (str, os.PathLike)):
        path = expanded(images)
        return [path / name for name, _ in find_images(path, {"": 0})[0]] if path.is_dir() else [path]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim in (0, 2, 3):
        return [images]
    return list(images) if isinstance(images, Iterable) else [images]


def _opened(image: Any, name: str) -> Image.Image:
    """Read or convert an image to RGB; `name` is for errors of one without a path."""
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image))
    if isinstance(image, (np.ndarray, Tensor)):
        return from_pixels(image, name)
    if isinstance(image, Image.Image):
        return to_rgb(image, name)
    got = type(image).__name__
    raise InputError(f"must be paths, images of Pillow, or uint8 arrays; got {got}.", "images", _PREDICT)


def check_counts(**counts: int) -> None:
    """Raise an InputError if a value is not a whole number of at least 1."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"must be a whole number of at least 1; got {value}.", name, _PREDICT)


def check_threshold(threshold: float | None) -> None:
    """Raise an InputError if the threshold is not a number from 0 to 1, or None."""
    if threshold is not None and (isinstance(threshold, (bool, str)) or not 0 <= threshold <= 1):
        raise InputError(
            f"must be a number from 0 to 1; got {threshold!r}. The run's report.html has "
            "thresholds with their accuracy.",
            "threshold",
            _PREDICT,
        )
