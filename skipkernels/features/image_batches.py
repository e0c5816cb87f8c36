"""Loading of the images of a dataset in batches, with a seed per view and item, and checks of every item."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..labels import whole_number
from ..store import StoreError


class Batch(NamedTuple):
    """Batch of items of a dataset."""

    rows: list[int]  # Row numbers: view · items + item
    images: Tensor  # [n, 3, height, width]
    labels: Tensor  # [n] int64


def load_batches(
    dataset: Any, batches: Sequence[Sequence[int]], *, seed: int = 0, first_view: int = 0, workers: int = 0
) -> Generator[Batch, None, None]:
    """Load rows of a map-style dataset, in order: of each of `batches`, in `workers` processes that this call starts.

    Row r is item r mod n in view `first_view` + r div n. Every view of every item has its own seed, so that a resumed
    build computes the same rows, in any process.
    """
    # A generator, so that DataLoader draws no seed from the global one.
    unbatched: dict[str, Any] = {"batch_size": None, "collate_fn": _unchanged, "generator": torch.Generator()}
    items = _Items(dataset, seed, first_view)
    return _loaded(iter(DataLoader(items, sampler=batches, num_workers=workers, **unbatched)))


def _loaded(loading: Iterator[Batch | StoreError]) -> Generator[Batch, None, None]:
    try:
        for batch in loading:
            if isinstance(batch, StoreError):
                raise batch
            yield batch
    finally:
        del loading  # stops its processes now; a stored error would keep them alive by its traceback


class _Items(Dataset):
    """Batches by rows. Errors are returned: DataLoader changes the text of raised ones."""

    def __init__(self, dataset: Any, seed: int, first_view: int):
        self.dataset, self.seed, self.first_view = dataset, seed, first_view

    def __getitem__(self, rows: Sequence[int]) -> Batch | StoreError:
        count, labels = len(self.dataset), []
        images: list[Tensor] = []
        try:
            for row in rows:
                image, label = self._load(*divmod(row, count))
                if images and image.shape != images[0].shape:
                    raise StoreError(
                        f"FeatureCache: the image of item {row % count} of the dataset must be "
                        f"{list(images[0].shape)}, like those before it; got {list(image.shape)}. Crop or resize it."
                    )
                images.append(image)
                labels.append(label)
            return Batch(list(rows), torch.stack(images), torch.tensor(labels))
        except StoreError as error:
            return error

    def _load(self, view: int, item: int) -> tuple[Tensor, int]:
        try:
            with _seeded(self.seed, self.first_view + view, item):
                loaded = self.dataset[item]
        except Exception as error:
            raise _load_error(item, error) from error
        return _checked(loaded, item)


def _load_error(item: int, error: Exception) -> StoreError:
    """Return a StoreError for an error of a dataset; errors of this package already name the file and the remedy."""
    known = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    found = StoreError(str(error) if known else f"FeatureCache: item {item} of the dataset cannot be loaded: {error!r}")
    found.item = item
    return found


def _checked(loaded: Any, item: int) -> tuple[Tensor, int]:
    """Return an item as (image tensor, label); raise a StoreError if it has another type or shape."""
    if not (isinstance(loaded, (tuple, list)) and len(loaded) == 2):
        raise StoreError(
            f"FeatureCache: item {item} of the dataset must be (image, label); got {type(loaded).__name__}."
        )
    image, label = loaded
    # A model would accept whole numbers, and compute other features.
    if not (isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()):
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise StoreError(
            f"FeatureCache: the image of item {item} of the dataset must be a floating-point tensor [3, height, width];"
            f" got {got}. Give the dataset the model's own preprocessing as its transform."
        )
    class_id = whole_number(label)
    if class_id is None or not -(2**63) <= class_id < 2**63:
        raise StoreError(
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


def split_batches(ranges: Iterable[range], batch_size: int) -> list[range]:
    """Split each range into batches.

    >>> split_batches([range(0, 5), range(5, 7)], 3)
    [range(0, 3), range(3, 5), range(5, 7)]
    """
    return [part[start : start + batch_size] for part in ranges for start in range(0, len(part), batch_size)]
