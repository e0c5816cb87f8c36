"""Extraction: features of all images of a dataset at the cut, written to a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _progress
from ..options import Refresh
from .identity import check_probe, model_identity, probe
from .image_batches import load_batches, split_batches
from .table import COMPUTED, CacheError, Layout, MappedTable
from .writer import TableWriter

if TYPE_CHECKING:
    from ..clip import SkipCLIP

_NAME_OF = {dtype: name for name, dtype in COMPUTED.items()}


class Encoder:
    """Function from images to features at the cut, on the CPU.

    Runs a copy of the modules below the cut that shares their weights, with the autocast enabled at construction.
    """

    def __init__(self, clip: SkipCLIP):
        self.device = clip.prototypes.device
        self.image_size = clip.image_size
        self._lower = clip.images.lower_copy()
        enabled = torch.is_autocast_enabled(self.device.type)
        self._autocast = torch.get_autocast_dtype(self.device.type) if enabled else None

    @property
    def precision(self) -> str:
        """Dtype of autocast, or "none"."""
        return "none" if self._autocast is None else _NAME_OF[self._autocast]

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


@dataclass
class Extraction:
    """Model, dataset and options of a cache, and the writing of its table."""

    clip: SkipCLIP
    dataset: Any  # Map-style dataset of (image, label)
    identity: dict[str, str | int]  # of the dataset, from `dataset_identity`
    dtype: str  # Dtype in the folder
    refresh: Refresh
    batch_size: int  # Images per forward pass
    workers: int  # Number of processes that load images
    seed: int  # Seed of random transforms
    progress: Callable[[int], None] | bool  # Called with the number of images of each batch; True shows a bar

    def __post_init__(self) -> None:
        self.encode = Encoder(self.clip)

    def layout(self, epoch: int, probed: Tensor) -> Layout:
        """Layout of the table of an epoch."""
        features = self.encode(torch.zeros(1, 3, *self.clip.image_size))[0]
        return Layout(
            rows=len(self.dataset),
            shape=tuple(features.shape),
            dtype=self.dtype,
            computed=_NAME_OF[features.dtype],
            labelled=True,
            identity=model_identity(self.clip)
            | self.identity
            | {"refresh": self.refresh, "epoch": epoch, "seed": self.seed}
            | {"batch size": self.batch_size, "autocast": self.encode.precision},
            probe=probed.tolist(),
        )

    def write(self, folder: Path, epoch: int = 0, *, resume: bool = False, overwrite: bool = False) -> MappedTable:
        """Compute the features of an epoch, with `resume` those that are missing; return the complete table."""
        probed, title = probe(self.clip), f"features → {folder}"
        with (
            TableWriter(folder, self.layout(epoch, probed), resume=resume, overwrite=overwrite) as writer,
            _progress.progress(title, len(self.dataset), shown=self.progress is True) as bar,
        ):
            check_probe(writer.layout, probed, folder)
            advance: Callable[[int], object] = self.progress if callable(self.progress) else bar
            # A batch with a missing row is computed whole: the last bits of features depend on the batch.
            batches = split_batches(len(self.dataset), self.batch_size)
            missing = [batch for batch in batches if writer.missing[batch.start : batch.stop].any()]
            if existing := len(self.dataset) - sum(map(len, missing)):
                advance(existing)
            options = {"seed": self.seed, "epoch": epoch, "workers": self.workers}
            with contextlib.closing(load_batches(self.dataset, missing, **options)) as loaded:
                for batch in loaded:
                    features = self.encode(batch.images)
                    self._check_range(features, batch.items)
                    writer.write(batch.items[0], features, batch.labels)
                    advance(len(batch.items))
        return MappedTable.open(folder)

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
