"""Reading of images: files, also several in threads, and arrays of pixels."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .base import InputError
from .decoder import decode

if TYPE_CHECKING:
    from torch import Tensor


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, upright by its EXIF orientation; of an animation, the first frame.

    Transparency is dropped, and 16-bit values keep their upper 8 bits.

    Raises:
        InputError: If the file is missing, is not an image, is damaged, or has too many pixels.
    """
    return decode(os.path.abspath(path), path)  # the decoder may be in another folder


def from_pixels(pixels: np.ndarray | Tensor, name: str) -> Image.Image:
    """Convert a uint8 array [H, W], [H, W, 3] or [H, W, 4], or a tensor [3, H, W], to an image: grey, RGB or RGBA.

    >>> image = from_pixels(np.zeros((2, 5, 4), np.uint8), "black")
    >>> image.mode, image.size
    ('RGBA', (5, 2))
    """
    if not isinstance(pixels, np.ndarray):
        expected, is_image = "a tensor [3, H, W]", pixels.ndim == 3 and pixels.shape[0] == 3
    else:
        expected = "an array [H, W], [H, W, 3] (RGB) or [H, W, 4] (RGBA)"
        is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    dtype = str(pixels.dtype).removeprefix("torch.")
    if dtype != "uint8" or not is_image or 0 in pixels.shape:
        hint = " From 0 to 1? Multiply by 255, round, and convert to uint8." if is_image and "float" in dtype else ""
        raise InputError(f"{name}: pixels must be {expected} of uint8; got {dtype} {list(pixels.shape)}.{hint}")
    values = pixels if isinstance(pixels, np.ndarray) else pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(values))


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
    try:
        pending = deque(pool.submit(attempt, index) for index in range(min(ahead, count)))
        for index in range(count):
            yield pending.popleft().result()
            if index + ahead < count:
                pending.append(pool.submit(attempt, index + ahead))
    finally:  # without waiting: this generator may be collected in one of these threads
        pool.shutdown(wait=False, cancel_futures=True)
