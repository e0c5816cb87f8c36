"""Loading of the images of a dataset in batches, with a seed per epoch and item, and checks of every item."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..labels import whole_number
from .table import CacheError


class Batch(NamedTuple):
    """Batch of items of a dataset."""

    items: list[int]
    images: Tensor  # [n, 3, height, width]
    labels: Tensor  # [n] int64


def load_batches(
    dataset: Any, batches: Sequence[Sequence[int]], *, seed: int = 0, epoch: int = 0, workers: int = 0
) -> Generator[Batch, None, None]:
    """Load items of a map-style dataset, in order: of each of `batches`, in `workers` processes that this call starts.

    Every item has its own seed in every epoch, so that a resumed build computes the same rows, in any process.
    """
    # A generator, so that DataLoader draws no seed from the global one.
    unbatched: dict[str, Any] = {"batch_size": None, "collate_fn": _unchanged, "generator": torch.Generator()}
    return _loaded(iter(DataLoader(_Items(dataset, seed, epoch), sampler=batches, num_workers=workers, **unbatched)))


def _loaded(loading: Iterator[Batch | CacheError]) -> Generator[Batch, None, None]:
    try:
        for batch in loading:
            if isinstance(batch, CacheError):
                raise batch
            yield batch
    finally:
        del loading  # stops its processes now; a stored error would keep them alive by its traceback


class _Items(Dataset):
    """Batches by item numbers. Errors are returned: DataLoader changes the text of raised ones."""

    def __init__(self, dataset: Any, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, items: Sequence[int]) -> Batch | CacheError:
        labels: list[int] = []
        images: list[Tensor] = []
        try:
            for item in items:
                image, label = self._load(item)
                if images and image.shape != images[0].shape:
                    raise CacheError(
                        f"FeatureCache: the image of item {item} of the dataset must be {list(images[0].shape)}, like "
                        f"those before it; got {list(image.shape)}. Crop or resize it."
                    )
                images.append(image)
                labels.append(label)
            return Batch(list(items), torch.stack(images), torch.tensor(labels))
        except CacheError as error:
            return error

    def _load(self, item: int) -> tuple[Tensor, int]:
        try:
            with _seeded(self.seed, self.epoch, item):
                loaded = self.dataset[item]
        except Exception as error:
            raise _load_error(item, error) from error
        return _checked(loaded, item)


def _load_error(item: int, error: Exception) -> CacheError:
    """Return a CacheError for an error of a dataset; errors of this package already name the file and the remedy."""
    known = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    found = CacheError(str(error) if known else f"FeatureCache: item {item} of the dataset cannot be loaded: {error!r}")
    found.item = item
    return found


def _checked(loaded: Any, item: int) -> tuple[Tensor, int]:
    """Return an item as (image tensor, label); raise a CacheError if it has another type or shape."""
    if not (isinstance(loaded, (tuple, list)) and len(loaded) == 2):
        raise CacheError(
            f"FeatureCache: item {item} of the dataset must be (image, label); got {type(loaded).__name__}."
        )
    image, label = loaded
    # A model would accept whole numbers, and compute other features.
    if not (isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()):
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise CacheError(
            f"FeatureCache: the image of item {item} of the dataset must be a floating-point tensor [3, height, width];"
            f" got {got}. Give the dataset the model's own preprocessing as its transform."
        )
    class_id = whole_number(label)
    if class_id is None or not -(2**63) <= class_id < 2**63:
        raise CacheError(
            f"FeatureCache: the label of item {item} of the dataset must be a whole number of 64 bits; got {label!r}."
        )
    return image, class_id


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _seeded(*seeds: int) -> Iterator[None]:
    """Seed PyTorch's, NumPy's and Python's generators, and restore their states at the end."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def split_batches(count: int, batch_size: int) -> list[range]:
    """Split item numbers into batches.

    >>> split_batches(5, 3)
    [range(0, 3), range(3, 5)]
    """
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
