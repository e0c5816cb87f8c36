"""Extraction: features of all images of a dataset, in batches that are loaded with a seed per epoch and item."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..dtypes import autocast_dtype
from ..labels import whole_number
from ..memory import free_bytes
from .folder_table import DTYPE_NAMES, CacheError
from .table import MemoryTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..clip import SkipCLIP

Write = Callable[[int, Tensor, Tensor], object]  # first row, features [n, …], labels [n]


class Encoder:
    """Function from images to features at the cut, on the CPU. Errors of `clip` name the public `function`."""

    def __init__(self, function: str, clip: SkipCLIP):
        if not hasattr(clip, "encode_lower"):  # isinstance would need an import in a circle
            raise TypeError(
                f"{function}: clip must be a SkipCLIP; got {type(clip).__name__}. Wrap the model: "
                "SkipCLIP(model, tokens, skip_layers=…)."
            )
        if clip.skip_layers[0] == 0:
            raise ValueError(
                f"{function}: with skip_layers=0 the image embedding trains, so features cannot be cached. Skip "
                "a block, or train from images."
            )
        self._images, self._device, self._image_size = clip.images, clip.prototypes.device, clip.image_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, height, width] to features [n, …]."""
        if images.shape[1:] != (3, *self._image_size):
            raise CacheError(
                f"FeatureCache.build: images must be [3, {self._image_size[0]}, {self._image_size[1]}], the model's "
                f"input size; got {list(images.shape[1:])}. Give the dataset the model's own preprocessing."
            )
        self._images.watch()
        return self._images.lower(images.to(self._device, non_blocking=True)).cpu()

    def probe(self) -> Tensor:
        """Features of a fixed image."""
        generator = torch.Generator().manual_seed(0)
        return self(torch.randn(1, 3, *self._image_size, generator=generator, device="cpu"))[0]

    def identity(self) -> dict[str, str | int]:
        """Return what features depend on below the cut: weights, buffers, the cut and autocast."""
        weights, autocast = self._images.tower.lower_identity(), autocast_dtype(self._device)
        return {f"image {name}": value for name, value in weights.items()} | {
            "autocast": "none" if autocast is None else DTYPE_NAMES[autocast]
        }


@dataclass
class Images:
    """Map-style dataset of (image, label), and how it is loaded.

    Every item has its own seed in every epoch, so that a resumed build computes the same rows, in any process.
    """

    function: str  # Public function that errors of the arguments name
    dataset: Any
    batch_size: int
    workers: int  # Number of processes that load images
    seed: int  # Seed of random transforms

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("workers", 0), ("seed", 0)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{self.function}: {name} must be at least {least}, a whole number; got {number!r}.")
        if not (hasattr(self.dataset, "__len__") and hasattr(self.dataset, "__getitem__") and len(self.dataset)):
            raise ValueError(
                f"{self.function}: dataset must be map-style, with `__len__` and `__getitem__`, and have at least one "
                f"image; got {type(self.dataset).__name__}. Pass list(dataset) if it fits into memory."
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def extract(
        self,
        encode: Callable[[Tensor], Tensor],
        write: Write,
        advance: Callable[[int], object],
        *,
        epoch: int = 0,
        missing: NDArray[np.bool_] | None = None,
    ) -> None:
        """Load the images of an epoch, and write their encodings; with `missing`, those of batches with such rows.

        A batch is computed whole, also if some of its rows exist: the last bits of features depend on the batch.
        """
        starts = range(0, len(self), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(self))) for start in starts]
        if missing is not None:
            batches = [batch for batch in batches if missing[batch.start : batch.stop].any()]
        if existing := len(self) - sum(map(len, batches)):
            advance(existing)
        loading = iter(
            DataLoader(
                _Batches(self.dataset, self.seed, epoch),
                sampler=batches,
                batch_size=None,
                num_workers=self.workers if batches else 0,
                generator=torch.Generator(),  # else DataLoader draws a seed from the global one
            )
        )
        try:
            for batch in loading:
                if isinstance(batch, CacheError):
                    raise batch
                with torch.no_grad():
                    write(batch.first, encode(batch.images), batch.labels)
                advance(len(batch.labels))
        finally:
            del loading  # stops its processes now; a stored error would keep them alive by its traceback

    def compute(
        self,
        encode: Callable[[Tensor], Tensor],
        epoch: int,
        advance: Callable[[int], object] = lambda count: None,
    ) -> tuple[MemoryTable, Tensor]:
        """Return the encodings of the images of an epoch, in memory, and their labels."""
        labels = torch.empty(len(self), dtype=torch.int64, device="cpu")
        features: Tensor | None = None  # [n, …], allocated with the first batch

        def write(first: int, output: Tensor, of_batch: Tensor) -> None:
            nonlocal features
            if features is None:
                features = _empty(output, len(labels))
            place = slice(first, first + len(output))
            features[place], labels[place] = output, of_batch

        self.extract(encode, write, advance, epoch=epoch)
        assert features is not None
        return MemoryTable(features), labels


def _empty(output: Tensor, count: int) -> Tensor:
    """Memory [count, …] for outputs [n, …]; a MemoryError if it takes more than half of the free memory."""
    needed, free = output[0].nbytes * count, free_bytes(output.device)
    if needed > free / 2:
        raise MemoryError(
            f"FeatureCache.in_memory: {count} items of {list(output.shape[1:])} {output.dtype} take "
            f"{needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB of free memory. "
            "Use FeatureCache.build (tune: `cache`), fewer shots or classes, or a smaller model; for `refresh=epoch` a "
            "loop of your own that trains from images, with the same loss."
        )
    return output.new_empty(count, *output.shape[1:])


class _Batch(NamedTuple):
    first: int  # number of the first item
    images: Tensor  # [n, 3, height, width]
    labels: Tensor  # [n] int64


class _Batches(Dataset):
    """Batches by item numbers. Errors are returned: DataLoader changes the text of raised ones."""

    def __init__(self, dataset: Any, seed: int, epoch: int):
        self._dataset, self._seed, self._epoch = dataset, seed, epoch

    def __getitem__(self, items: Sequence[int]) -> _Batch | CacheError:
        try:
            images, labels = zip(*map(self._load, items), strict=True)
            for item, image in zip(items, images, strict=True):
                if image.shape != images[0].shape:
                    raise CacheError(
                        f"FeatureCache: the image of item {item} of the dataset must be {list(images[0].shape)}, like "
                        f"those before it; got {list(image.shape)}. Crop or resize it."
                    )
            return _Batch(items[0], torch.stack(images), torch.tensor(labels, device="cpu"))
        except CacheError as error:
            return error

    def _load(self, item: int) -> tuple[Tensor, int]:
        try:
            with _seeded(self._seed, self._epoch, item):
                loaded = self._dataset[item]
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
