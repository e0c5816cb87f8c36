"""Extraction: features of all images of a dataset at the cut, to a table in a folder or in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _progress
from ..memory import free_bytes
from ..options import CacheDtype, Refresh
from ..reference import autocast_dtype
from .identity import check_probe, model_identity, probe
from .image_batches import load_batches, split_batches
from .table import COMPUTED_DTYPES, CacheError, Layout, MappedTable, MemoryTable
from .writer import TableWriter

if TYPE_CHECKING:
    from ..clip import SkipCLIP

Progress = Callable[[int], None] | bool  # called with the number of images of each batch; True shows a bar
_NAME_OF = {dtype: name for name, dtype in COMPUTED_DTYPES.items()}


class Encoder:
    """Function from images to features at the cut, on the CPU.

    Runs a copy of the modules below the cut that shares their weights, within autocast to a dtype, if there is one.
    """

    def __init__(self, clip: SkipCLIP, autocast: torch.dtype | None):
        self.device = clip.prototypes.device
        self.image_size = clip.image_size
        self._lower, self._autocast = clip.images.lower_copy(), autocast

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images [n, 3, height, width] to features [n, …]."""
        if images.shape[1:] != (3, *self.image_size):
            raise CacheError(
                f"FeatureCache.build: images must be [3, {self.image_size[0]}, {self.image_size[1]}], the model's "
                f"input size; got {list(images.shape[1:])}. Give the dataset the model's own preprocessing."
            )
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return self._lower(images.to(self.device, non_blocking=True)).cpu()


def autocast_identity(autocast: torch.dtype | None) -> dict[str, str | int]:
    """Return the entry of the identity of a cache that names the autocast of its features."""
    return {"autocast": "none" if autocast is None else _NAME_OF[autocast]}


@dataclass
class Extraction:
    """Features of a dataset by a SkipCLIP, written to a table in a folder; see `FeatureCache.build`."""

    clip: SkipCLIP
    dataset: Any  # Map-style dataset of (image, label)
    dataset_identity: dict[str, str | int]  # from `identity.dataset_identity`
    dtype: CacheDtype  # Dtype in the folder
    refresh: Refresh
    batch_size: int  # Images per forward pass
    workers: int  # Number of processes that load images
    seed: int  # Seed of random transforms

    def __post_init__(self) -> None:
        self._autocast = autocast_dtype(self.clip.prototypes.device)  # also of later epochs

    def _layout(self, epoch: int, probed: Tensor, encode: Encoder) -> Layout:
        """Layout of the table of an epoch."""
        features = encode(torch.zeros(1, 3, *self.clip.image_size))[0]
        return Layout(
            rows=len(self.dataset),
            shape=tuple(features.shape),
            dtype=self.dtype,
            computed_dtype=_NAME_OF[features.dtype],
            labelled=True,
            identity=model_identity(self.clip)
            | self.dataset_identity
            | {"refresh": self.refresh, "epoch": epoch, "seed": self.seed}
            | {"batch size": self.batch_size}
            | autocast_identity(self._autocast),
            probe=probed.tolist(),
        )

    def write(
        self,
        folder: Path,
        epoch: int = 0,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: Progress = False,
    ) -> MappedTable:
        """Compute the features of an epoch, with `resume` those that are missing; return the complete table."""
        encode = Encoder(self.clip, self._autocast)  # on the device of now
        probed, title = probe(self.clip), f"features → {folder}"
        with (
            TableWriter(folder, self._layout(epoch, probed, encode), resume=resume, overwrite=overwrite) as writer,
            _progress.progress(title, len(self.dataset), shown=progress is True) as bar,
        ):
            check_probe(writer.layout, probed, folder)
            advance: Callable[[int], object] = progress if callable(progress) else bar
            # A batch with a missing row is computed whole: the last bits of features depend on the batch.
            batches = split_batches(len(self.dataset), self.batch_size)
            missing = [batch for batch in batches if writer.missing[batch.start : batch.stop].any()]
            if existing := len(self.dataset) - sum(map(len, missing)):
                advance(existing)
            options = {"seed": self.seed, "epoch": epoch, "workers": self.workers if missing else 0}
            with contextlib.closing(load_batches(self.dataset, missing, **options)) as loaded:
                for batch in loaded:
                    features = encode(batch.images)
                    self._check_range(features, batch.items)
                    writer.write(batch.items[0], features, batch.labels)
                    advance(len(batch.items))
        return MappedTable.open(folder)

    def refill(self, folder: Path, epoch: int) -> tuple[MappedTable, Tensor]:
        """Replace the rows in the folder by those of an epoch; return them and their labels."""
        table = self.write(folder, epoch, overwrite=True)
        return table, table.labels()

    def _check_range(self, features: Tensor, items: list[int]) -> None:
        """Raise a CacheError if features are not finite, or out of the range of fp16 in the folder."""
        largest = features.abs().flatten(1).amax(dim=1).float()
        limit = torch.finfo(torch.float16).max if self.dtype == "fp16" else torch.finfo(torch.float32).max
        in_range = largest <= limit  # False for NaN
        if not in_range.all():
            wrong = int((~in_range).nonzero()[0])
            fp16_overflow = self.dtype == "fp16" and largest[wrong].isfinite()
            remedy = 'Use dtype="bf16".' if fp16_overflow else "Check the image and the weights."
            raise CacheError(
                f"FeatureCache.build: the features of item {items[wrong]} reach {largest[wrong]:.3g}, out of the range "
                f"of {self.dtype}. {remedy}"
            )


def epoch_in(folder: Path) -> int:
    """Epoch of the features in a folder; 0 without any."""
    try:
        return int(Layout.read(folder).identity.get("epoch", 0))
    except (CacheError, ValueError):
        return 0


class MemoryExtraction:
    """Outputs of a function for all images of a dataset, in memory; see `FeatureCache.in_memory`."""

    def __init__(self, dataset: Any, encode: Callable[[Tensor], Tensor], *, batch_size: int, workers: int, seed: int):
        self._dataset, self._encode = dataset, encode
        self._batches = split_batches(len(dataset), batch_size)
        self._seed, self._workers = seed, workers
        self._features: Tensor | None = None  # [n, …], allocated once: every epoch is written over the one before

    def refill(self, epoch: int, progress: Progress = False) -> tuple[MemoryTable, Tensor]:
        """Compute the features of an epoch, over those of any other; return them and their labels."""
        labels = torch.empty(len(self._dataset), dtype=torch.int64)
        options = {"seed": self._seed, "epoch": epoch, "workers": self._workers}
        with contextlib.closing(load_batches(self._dataset, self._batches, **options)) as loaded:
            for batch in loaded:
                with torch.no_grad():
                    output = self._encode(batch.images)
                if self._features is None:
                    self._features = _empty(output, len(labels))
                place = slice(batch.items[0], batch.items[-1] + 1)
                self._features[place], labels[place] = output, batch.labels
                if callable(progress):
                    progress(len(batch.items))
        assert self._features is not None
        return MemoryTable(self._features), labels


def _empty(output: Tensor, count: int) -> Tensor:
    """Memory [count, …] for outputs [n, …]; a MemoryError if it takes more than half of the free memory."""
    needed, free = output[0].nbytes * count, free_bytes(output.device)
    if needed > free / 2:
        raise MemoryError(
            f"FeatureCache.in_memory: {count} items of {list(output.shape[1:])} {output.dtype} take "
            f"{needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB of free memory. "
            "Use FeatureCache.build (tune: `cache`), fewer shots or classes, or a smaller model."
        )
    return output.new_empty(count, *output.shape[1:])
