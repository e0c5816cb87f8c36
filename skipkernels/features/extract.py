"""Images of a dataset through a function, in batches: what keeping features has in common, wherever they are kept."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..store import StoreError


class Batch(NamedTuple):
    """Some items.

    Attributes:
        rows: Their numbers: view · items + item.
        images: [n, 3, height, width].
        labels: [n] int64.
    """

    rows: list[int]
    images: Tensor
    labels: Tensor


def is_iterable_only(dataset: Any) -> bool:
    """Whether a dataset cannot be asked for an item by number."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def is_gone_once_read(dataset: Any) -> bool:
    """Whether an iterable gives what is left of it, and not all of it again, when it is asked again."""
    with _seeded(0):
        return iter(dataset) is iter(dataset)


def batches_of(
    dataset: Any, batches: Sequence[Sequence[int]], *, seed: int = 0, first_view: int = 0, workers: int = 0
) -> Generator[Batch, None, None]:
    """Load some rows of a dataset, in order.

    Row r is item r mod n, in view r div n. Every view of every item is drawn with a seed of its own, whoever draws it,
    so that a build that is taken up again makes the same rows. The processes that load begin before this returns.

    Args:
        dataset: Map-style of (image tensor, label), or an iterable of those with a length.
        batches: The rows of each batch, ascending.
        seed: Of random transforms.
        first_view: Of the rows from 0 on.
        workers: Processes that load; an iterable has one at most, since it can't be divided.

    Raises:
        StoreError: If an item is something else, or can't be loaded; says which.
    """
    data: Dataset
    if is_iterable_only(dataset):
        data, sampler, workers = _Stream(dataset, batches, seed, first_view), None, min(workers, 1)
    else:
        data, sampler = _Views(dataset, seed, first_view), batches
    alone: dict[str, Any] = {"batch_size": None, "collate_fn": _as_it_is, "generator": torch.Generator()}
    return _loaded(iter(DataLoader(data, sampler=sampler, num_workers=workers, **alone)), workers)


def _loaded(loading: Iterator[Batch | StoreError], workers: int) -> Generator[Batch, None, None]:
    try:
        for batch in loading:
            if isinstance(batch, StoreError):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # what comes of a dataset is a StoreError
        if workers == 0:
            raise
        raise loading_failed(error) from error
    finally:
        del loading  # ends its processes now: whoever has caught an error would keep them


def loading_failed(error: Exception) -> StoreError:
    """What to say when processes that load images have failed, in whatever way that showed."""
    reason = str(error).partition("\n")[0].strip(" .") or type(error).__name__
    return StoreError(
        f"FeatureCache: a process that loads images has died ({reason}). Use fewer workers if memory was short; what "
        "was begun goes on with resume=True (--resume)."
    )


class _Views(Dataset):
    """Asked for the rows of a batch, gives them, or the error that is in the way: raised, it would lose its text."""

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
            raise _not_loaded(item, error) from error
        return row, *_checked(loaded, item)


_END = object()


class _Stream(IterableDataset):
    """Goes through an iterable once a view, and gives the batches that are wanted of it, or an error."""

    def __init__(self, dataset: Any, batches: Sequence[Sequence[int]], seed: int, first_view: int):
        self.dataset, self.batches, self.seed, self.first_view = dataset, batches, seed, first_view

    def __iter__(self) -> Iterator[Batch | StoreError]:
        everything = self._rows()
        for batch in self.batches:
            yield _batch(self._wanted(everything, batch), len(self.dataset))

    def _wanted(self, everything: Iterator[tuple[int, Any, int]], batch: Sequence[int]) -> Iterator[Any]:
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
                        f"FeatureCache: the dataset has a length of {items}, and ended after {item} items."
                    )
                if item == items - 1 and next(stream, _END) is not _END:  # looked at before the last item is kept
                    raise StoreError(
                        f"FeatureCache: the dataset has a length of {items}, and goes on after {items} items. Let its "
                        "length be how many it gives."
                    )
                yield view * items + item, loaded, item

    def _view(self, view: int) -> Iterator[Any]:
        """What the iterable gives, drawn as that view of it: its order, too, is drawn the same again."""
        stream: Iterator[Any] | None = None
        for item in itertools.count():
            try:
                with _seeded(self.seed, self.first_view + view, item):
                    stream = iter(self.dataset) if stream is None else stream
                    loaded = next(stream)
            except StopIteration:
                return
            except Exception as error:
                raise _not_loaded(item, error) from error
            yield loaded


def _not_loaded(item: int, error: Exception) -> StoreError:
    """What to say of an error of a dataset; one of this package's own names the file and the remedy already."""
    if type(error).__module__.partition(".")[0] == __name__.partition(".")[0]:
        return StoreError(str(error))
    return StoreError(f"FeatureCache: item {item} of the dataset can't be loaded: {error!r}")


def _checked(loaded: Any, item: int) -> tuple[Tensor, int]:
    """An item as (image tensor, label).

    Raises:
        StoreError: If it is something else.
    """
    if not (isinstance(loaded, (tuple, list)) and len(loaded) == 2):
        raise StoreError(
            f"FeatureCache: item {item} of the dataset must be (image, label); got {type(loaded).__name__}."
        )
    image, label = loaded
    if not (isinstance(image, Tensor) and image.ndim == 3):
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise StoreError(
            f"FeatureCache: the image of item {item} of the dataset must be a tensor [3, height, width]; got {got}. "
            "Give the dataset the model's own preprocessing as its transform."
        )
    if not image.is_floating_point():  # a model would take it, and give something else
        raise StoreError(
            f"FeatureCache: the image of item {item} of the dataset must be floating-point numbers, normalised as the "
            f"model takes them; got {image.dtype}. Give the dataset the model's own preprocessing as its transform."
        )
    if isinstance(label, (Tensor, np.generic, np.ndarray)) and getattr(label, "ndim", 0) == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int):
        raise StoreError(
            f"FeatureCache: the label of item {item} of the dataset must be a whole number; got {label!r}."
        )
    if not -(2**63) <= label < 2**63:
        raise StoreError(f"FeatureCache: the label of item {item} of the dataset must fit 64 bits; got {label}.")
    return image, label


def _batch(found: Iterable[tuple[int, Tensor, int]], items: int) -> Batch | StoreError:
    """What was found in one, or the error that came up."""
    try:
        rows, images, labels = zip(*found, strict=True)
        for row, image in zip(rows, images, strict=True):
            if image.shape != images[0].shape:
                raise StoreError(
                    f"FeatureCache: the image of item {row % items} of the dataset must be {list(images[0].shape)}, as "
                    f"those before it; got {list(image.shape)}. Crop or resize it."
                )
        return Batch(list(rows), torch.stack(images), torch.tensor(labels))
    except StoreError as error:
        return error


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _seeded(*seeds: int) -> Iterator[None]:
    """Draw from PyTorch's, NumPy's and Python's generators as from new ones, and leave them as they were."""
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


def batch_numbers(ranges: Iterable[range], batch_size: int) -> list[range]:
    """Ranges cut into batches; none reaches from one into the next.

    >>> batch_numbers([range(0, 5), range(5, 7)], 3)
    [range(0, 3), range(3, 5), range(5, 7)]
    """
    return [part[start : start + batch_size] for part in ranges for start in range(0, len(part), batch_size)]


Encode = Callable[[Tensor], Tensor]
"""Images [n, 3, height, width] to features [n, …]."""
