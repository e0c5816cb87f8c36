"""Features in memory, for few-shot data sets."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..memory import free_bytes
from .image_batches import load_batches, split_batches

Encode = Callable[[Tensor], Tensor]
"""Images [n, 3, height, width] to features [n, …]."""


class MemoryRows:
    """Rows [n, *shape] in a tensor, `rows`, with the interface of a `Store`."""

    rows_per_read = 0  # no limit

    def __init__(self, rows: Tensor):
        self.rows, self.shape, self.dtype, self.device = rows, tuple(rows.shape[1:]), rows.dtype, rows.device

    def expect(self, index: Tensor) -> None:
        """Do nothing: the rows are in memory."""

    def gather(self, index: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Gather rows by number [B], into `out` [B, *shape] if given."""
        width = math.prod(self.shape[1:])
        rows = self.rows.view(len(self.rows), self.shape[0], width)
        flat_out = None if out is None else out.view(len(index), self.shape[0], width)
        return functional.gather_rows(rows, index.to(self.device), out=flat_out).view(len(index), *self.shape)


def collect(
    dataset: Any,
    encode: Encode = lambda images: images,
    *,
    batch_size: int = 64,
    workers: int = 0,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[MemoryRows, Tensor]:
    """Encode every image once, without gradients; return outputs and labels [n]. See `FeatureCache.in_memory`."""
    count = len(dataset)
    labels = torch.empty(count, dtype=torch.int64)
    encoded: Tensor | None = None
    for batch in load_batches(dataset, split_batches([range(count)], batch_size), workers=workers):
        with torch.no_grad():
            output = encode(batch.images)
        if encoded is None:
            _check_memory(output, count)
            encoded = output.new_empty(count, *output.shape[1:])
        encoded[batch.rows[0] : batch.rows[-1] + 1] = output
        labels[batch.rows[0] : batch.rows[-1] + 1] = batch.labels
        on_batch(len(batch.rows))
    if encoded is None:
        raise ValueError("FeatureCache.in_memory: the dataset has no images.")
    return MemoryRows(encoded), labels


def _check_memory(output: Tensor, count: int) -> None:
    needed = output[0].nbytes * count
    free = free_bytes(output.device)
    if needed > free / 2:
        raise MemoryError(
            f"FeatureCache.in_memory: {count} items of {list(output.shape[1:])} {output.dtype} take "
            f"{needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB of free memory. Use a cache "
            "on the disk (FeatureCache.build), fewer shots or classes, or a smaller model."
        )
