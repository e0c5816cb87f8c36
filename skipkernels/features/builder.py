"""Building of a feature store from a dataset, by one process or several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _progress
from ..options import Refresh
from ..store import COMPUTED, Layout, StoreError, Writer, path_of, quantise, write_shard
from . import fingerprint
from .dataset_key import check_samples
from .image_batches import Batch, load_batches, split_batches

if TYPE_CHECKING:
    from ..clip import SkipCLIP

_NAME_OF = {dtype: name for name, dtype in COMPUTED.items()}

SHARD_BYTES = 128 << 20
"""Approximate bytes of a shard. A kill loses at most one shard; a build holds one in memory."""


class Encoder:
    """Function from images to features at the cut, on the CPU.

    Runs a copy of the modules below the cut that shares their weights, with the autocast enabled at construction.
    """

    def __init__(self, clip: SkipCLIP):
        self.device = clip.prototypes.device
        self.image_size = clip.image_size
        self._lower = clip.lower_copy()
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
            raise StoreError(
                f"FeatureCache.build: images must be [3, {self.image_size[0]}, {self.image_size[1]}], the model's "
                f"input size; got {list(images.shape[1:])}. Give the dataset the model's own preprocessing."
            )
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return self._lower(images.to(self.device, non_blocking=True)).cpu()


@dataclass
class Builder:
    """Inputs and options of a store, which `write` builds."""

    clip: SkipCLIP
    dataset: Any  # Map-style dataset of (image, label)
    dtype: str  # Storage dtype of features
    views: int
    refresh: Refresh
    batch_size: int  # Images per forward pass
    workers: int  # Number of processes that load images
    seed: int  # Seed of random transforms
    dataset_key: dict[str, str]  # Fingerprint of the dataset, from `dataset_key`
    samples: list[dict[str, Any]]  # Summaries of a few items, from `sample_images`
    shard_bytes: int  # Approximate bytes of a shard
    progress: Callable[[int], None] | bool  # Called with the number of images of each batch; True shows a bar
    group: dist.ProcessGroup | None  # Processes that build together

    def __post_init__(self) -> None:
        self.encode = Encoder(self.clip)

    def layout(self, first_view: int) -> Layout:
        """Layout of the store."""
        features = self.encode(torch.zeros(1, 3, *self.clip.image_size))[0]
        items = len(self.dataset)
        layout = Layout(
            rows=items * self.views,
            shape=tuple(features.shape),
            dtype=self.dtype,
            computed=_NAME_OF[features.dtype],
            shard_rows=1,
            labelled=True,
            fingerprint=fingerprint.of_model(self.clip)
            | {"number of images": items}  # before the digests: this difference is reported first
            | self.dataset_key
            | {"number of views": self.views, "first view": first_view}
            | ({"refresh": "epoch"} if self.refresh == "epoch" else {})
            | {"seed": self.seed, "batch size": self.batch_size, "autocast": self.encode.precision},
            notes={"probe": fingerprint.probe(self.clip), "samples": self.samples},
        )
        # A shard has whole batches, so that a resumed build computes the same batches.
        batches = max(self.shard_bytes // layout.row_bytes // self.batch_size, 1)
        return replace(layout, shard_rows=batches * self.batch_size)

    def write(self, folder: Path, first_view: int = 0, *, resume: bool = False, overwrite: bool = False) -> None:
        """Build a store, or with `resume` its missing shards.

        Each process of the group encodes and writes every W-th missing shard. After each of its shards the first
        process adds those of all to the manifest. An error of one process is raised there only: the others wait for the
        timeout of the group, or until torchrun ends them.
        """
        rank, size = (0, 1) if self.group is None else (dist.get_rank(self.group), dist.get_world_size(self.group))
        layout, writer = self.layout(first_view), None
        title, shown = f"features → {folder}", self.progress is True and rank == 0
        with _progress.progress(title, layout.rows, shown=shown) as bar, contextlib.ExitStack() as stack:
            advance: Callable[[int], object] = self.progress if callable(self.progress) and rank == 0 else bar
            # 1. The first process chooses the shards to write.
            inputs = replace(layout, shard_rows=1).digest
            if rank == 0:
                writer = stack.enter_context(Writer(folder, layout, resume=resume, overwrite=overwrite))
                check_samples(writer.layout, self.samples, folder)
                layout = writer.layout
            plans = _gather((inputs, layout.shard_rows, writer and writer.missing), self.group)
            if len({digest for digest, _, _ in plans}) > 1:
                raise StoreError(
                    "FeatureCache.build: model, dataset and options must be equal on all processes of process_group; "
                    "got different ones. Pass the same on every process."
                )
            _, shard_rows, missing = plans[0]
            layout = replace(layout, shard_rows=shard_rows)
            if existing := layout.rows - sum(len(layout.rows_of(number)) for number in missing):
                advance(existing)
            # 2. Each process writes its own, and the first lists those of all.
            batches = split_batches([layout.rows_of(number) for number in missing[rank::size]], self.batch_size)
            options = {"seed": self.seed, "first_view": first_view, "workers": self.workers}
            loaded = stack.enter_context(contextlib.closing(load_batches(self.dataset, batches, **options)))
            for start in range(0, len(missing), size):
                written = {}
                for number in missing[start : start + size][rank : rank + 1]:
                    tensors = _encode_shard(layout, number, loaded, self.encode, advance)
                    written[number] = write_shard(folder, layout, number, tensors)
                shards = {number: shard for part in _gather(written, self.group) for number, shard in part.items()}
                if writer is not None:
                    for number in shards.keys() - written.keys():
                        advance(len(layout.rows_of(number)))
                        if not path_of(folder, number).exists():
                            raise StoreError(
                                f"{path_of(folder, number)}: another process has written it, and this one can't see "
                                "it. Choose a folder that all processes share."
                            )
                    writer.add(shards)
            _gather(None, self.group)  # wait until the first process has written the manifest


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Objects of all processes, in the order of ranks; collective."""
    if group is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _encode_shard(
    layout: Layout, number: int, loaded: Iterator[Batch], encode: Encoder, advance: Callable[[int], object]
) -> dict[str, Tensor]:
    """Encode the batches of a shard to its tensors."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in layout.tensors_of(number).items()}
    done, count = 0, len(layout.rows_of(number))
    while done < count:
        batch = next(loaded)
        features = encode(batch.images).view(len(batch.rows), *layout.stored_shape)
        _check_range(features, layout, batch.rows)
        place = slice(done, done + len(batch.rows))
        if layout.dtype == "int8":
            tensors["rows"][place], tensors["token_scale"][place] = quantise(features)
        else:
            tensors["rows"][place] = features
        tensors["labels"][place] = batch.labels
        done += len(batch.rows)
        advance(len(batch.rows))
    return tensors


def _check_range(features: Tensor, layout: Layout, rows: list[int]) -> None:
    """Raise a StoreError if features are not finite, or out of the range of fp16 storage."""
    largest = features.abs().amax(dim=(1, 2)).float()
    limit = torch.finfo(torch.float16).max if layout.dtype == "fp16" else torch.finfo(torch.float32).max
    in_range = largest <= limit  # False for NaN
    if not in_range.all():
        wrong = int((~in_range).nonzero()[0])
        item = rows[wrong] % int(layout.fingerprint["number of images"])
        fp16_overflow = layout.dtype == "fp16" and largest[wrong].isfinite()
        remedy = 'Use dtype="bf16".' if fp16_overflow else "Check the image and the weights."
        raise StoreError(
            f"FeatureCache.build: the features of item {item} reach {largest[wrong]:.3g}, out of the range of "
            f"{layout.dtype}. {remedy}"
        )
