"""Loading of the images of a dataset in batches, with a seed per view and item, and checks of every item."""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..checks import whole_number
from ..store import StoreError


class Batch(NamedTuple):
    """Batch of items of a dataset."""

    rows: list[int]  # Row numbers: view · items + item
    images: Tensor  # [n, 3, height, width]
    labels: Tensor  # [n] int64


def is_iterable_only(dataset: Any) -> bool:
    """Return True if a dataset cannot be indexed."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def is_one_shot(dataset: Any) -> bool:
    """Return True if an iterable can be iterated only once, such as an iterator."""
    with _seeded(0):
        return iter(dataset) is iter(dataset)


def load_batches(
    dataset: Any, batches: Sequence[Sequence[int]], *, seed: int = 0, first_view: int = 0, workers: int = 0
) -> Generator[Batch, None, None]:
    """Load rows of a dataset, in order: of each of `batches`, ascending.

    Row r is item r mod n in view `first_view` + r div n. Every view of every item has its own seed, so that a resumed
    build computes the same rows, in any process. `workers` processes load images, at most one for an iterable, which
    cannot be divided; they are started before this returns.
    """
    data: Dataset
    if is_iterable_only(dataset):
        data, sampler, workers = _IterableItems(dataset, batches, seed, first_view), None, min(workers, 1)
    else:
        data, sampler = _MapItems(dataset, seed, first_view), batches
    unbatched: dict[str, Any] = {"batch_size": None, "collate_fn": _unchanged, "generator": torch.Generator()}
    return _loaded(iter(DataLoader(data, sampler=sampler, num_workers=workers, **unbatched)), workers)


def _loaded(loading: Iterator[Batch | StoreError], workers: int) -> Generator[Batch, None, None]:
    try:
        for batch in loading:
            if isinstance(batch, StoreError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # errors of the dataset itself are StoreErrors
        if workers == 0:
            raise
        raise worker_error(error) from error
    finally:
        del loading  # stops its processes now; a stored error would keep them alive by its traceback


def worker_error(error: Exception) -> StoreError:
    """Return the error for worker processes that have died."""
    reason = str(error).partition("\n")[0].strip(" .") or type(error).__name__
    return StoreError(
        f"FeatureCache: a process that loads images has died ({reason}). Use fewer workers if memory was short; "
        "`resume=True` continues the build."
    )


class _MapItems(Dataset):
    """Batches of a map-style dataset by rows. Errors are returned: DataLoader changes the text of raised ones."""

    def __init__(self, dataset: Any, seed: int, first_view: int):
        self.dataset, self.seed, self.first_view = dataset, seed, first_view

    def __getitem__(self, rows: Sequence[int]) -> Batch | StoreError:
        return _batch(map(self._load, rows), len(self.dataset))

    def _load(self, row: int) -> tuple[int, Tensor, int]:
        view, item = divmod(row, len(self.dataset))
        try:
            with _seeded(self.seed, self.first_view + view, item):
                loaded = self.dataset[item]
        except Exception as error:
            raise _load_error(item, error) from error
        return row, *_checked(loaded, item)


_END = object()


class _IterableItems(IterableDataset):
    """Batches of an iterable, which is iterated once per view; errors are returned."""

    def __init__(self, dataset: Any, batches: Sequence[Sequence[int]], seed: int, first_view: int):
        self.dataset, self.batches, self.seed, self.first_view = dataset, batches, seed, first_view

    def __iter__(self) -> Iterator[Batch | StoreError]:
        everything = self._rows()
        for batch in self.batches:
            yield _batch(self._selected(everything, batch), len(self.dataset))

    def _selected(self, everything: Iterator[tuple[int, Any, int]], batch: Sequence[int]) -> Iterator[Any]:
        found = (found for found in everything if found[0] in batch)
        for row, loaded, item in itertools.islice(found, len(batch)):
            yield row, *_checked(loaded, item)

    def _rows(self) -> Iterator[tuple[int, Any, int]]:
        items = len(self.dataset)
        last = self.batches[-1][-1] if self.batches else -1
        for view in range(last // items + 1):
            stream = self._view(view)
            for item in range(items):
                loaded = next(stream, _END)
                if loaded is _END:
                    raise StoreError(
                        f"FeatureCache: the dataset has a length of {items}, but ended after {item} items."
                    )
                if item == items - 1 and next(stream, _END) is not _END:  # before the last item is used
                    raise StoreError(
                        f"FeatureCache: the dataset has a length of {items}, but gives more than {items} items. Return "
                        "the number of items as its length."
                    )
                yield view * items + item, loaded, item

    def _view(self, view: int) -> Iterator[Any]:
        """Items of one view; the seeds determine the items and their order."""
        stream: Iterator[Any] | None = None
        for item in itertools.count():
            try:
                with _seeded(self.seed, self.first_view + view, item):
                    stream = iter(self.dataset) if stream is None else stream
                    loaded = next(stream)
            except StopIteration:
                return
            except Exception as error:
                raise _load_error(item, error) from error
            yield loaded


def _load_error(item: int, error: Exception) -> StoreError:
    """Return a StoreError for an error of a dataset; errors of this package already name the file and the remedy."""
    known = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    found = StoreError(str(error) if known else f"FeatureCache: item {item} of the dataset cannot be loaded: {error!r}")
    found.item = item
    return found


def _checked(loaded: Any, item: int) -> tuple[Tensor, int]:
    """Return an item as (image tensor, label); raise a StoreError if it has another type or shape."""
    where = f"item {item} of the dataset"
    if not (isinstance(loaded, (tuple, list)) and len(loaded) == 2):
        raise StoreError(f"FeatureCache: {where} must be (image, label); got {type(loaded).__name__}.")
    image, label = loaded
    if not (isinstance(image, Tensor) and image.ndim == 3):
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise StoreError(
            f"FeatureCache: the image of {where} must be a tensor [3, height, width]; got {got}. "
            "Give the dataset the model's own preprocessing as its transform."
        )
    if not image.is_floating_point():  # a model would accept it, and compute other features
        raise StoreError(
            f"FeatureCache: the image of {where} must be floating-point numbers, normalised for the model; got "
            f"{image.dtype}. Give the dataset the model's own preprocessing as its transform."
        )
    class_id = whole_number(label)
    if class_id is None:
        raise StoreError(f"FeatureCache: the label of {where} must be a whole number; got {label!r}.")
    if not -(2**63) <= class_id < 2**63:
        raise StoreError(f"FeatureCache: the label of {where} must fit 64 bits; got {class_id}.")
    return image, class_id


def _batch(found: Iterable[tuple[int, Tensor, int]], items: int) -> Batch | StoreError:
    """Stack items into a batch, or return the error of an item."""
    try:
        rows, images, labels = zip(*found, strict=True)
        for row, image in zip(rows, images, strict=True):
            if image.shape != images[0].shape:
                raise StoreError(
                    f"FeatureCache: the image of item {row % items} of the dataset must be {list(images[0].shape)}, "
                    f"like those before it; got {list(image.shape)}. Crop or resize it."
                )
        return Batch(list(rows), torch.stack(images), torch.tensor(labels))
    except StoreError as error:
        return error


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
