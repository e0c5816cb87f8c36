"""Images of files and folders, decoded in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from ..data import InputError
from ..data.images import read_image, to_rgb

MAX_WORKERS = 8  # decoding is faster than a model on most machines; more threads only take memory


class Decoded(NamedTuple):
    """Name of an image, and its tensor [3, H, W] or the reason why it can't be read."""

    name: str
    image: Tensor | InputError


def image_names(images: Sequence[Any]) -> list[str]:
    """Name of each image: its path, or its number for an image without one."""
    return [os.fspath(image) if isinstance(image, (str, os.PathLike)) else str(n) for n, image in enumerate(images)]


def decode(
    images: Sequence[Any], transform: Callable[[Image.Image], Tensor], *, workers: int | None = None
) -> Iterator[Decoded]:
    """Decode and transform paths or Pillow images in threads, in their order; a bounded number is decoded ahead.

    `workers` is the number of threads, by default one for each core, at most 8.
    """

    def load(image: Any, name: str) -> Tensor | InputError:
        if not isinstance(image, (str, os.PathLike, Image.Image)):
            raise InputError(
                f"Classifier.predict: images must be paths or Pillow images; got {type(image).__name__}.", "images"
            )
        try:
            if isinstance(image, Image.Image):
                return to_rgb(image, f"image {name}", transform)
            return read_image(name, transform)
        except InputError as error:
            return error

    count = workers or min(MAX_WORKERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(count)
    waiting: deque[tuple[str, Future[Tensor | InputError]]] = deque()
    rest: Iterable[tuple[str, Any]] = iter(zip(image_names(images), images, strict=True))
    try:
        for name, image in rest:
            waiting.append((name, pool.submit(load, image, name)))
            if len(waiting) > 4 * count:
                name, future = waiting.popleft()
                yield Decoded(name, future.result())
        while waiting:
            name, future = waiting.popleft()
            yield Decoded(name, future.result())
    finally:  # without waiting: this generator may be collected in one of these threads
        pool.shutdown(wait=False, cancel_futures=True)


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Split items into lists of `size`, the last of which may be shorter.

    >>> list(batches("abc", 2))
    [['a', 'b'], ['c']]
    """
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
