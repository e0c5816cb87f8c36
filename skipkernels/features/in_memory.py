"""Features in memory: right for few-shot sets, refused where they would not fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional
from ..memory import free_bytes
from .extract import Encode, batch_numbers, batches_of


class MemoryRows:
    """Rows [n, *shape] in one tensor, asked for as those of a `Store` are.

    Attributes:
        rows: The tensor.
    """

    def __init__(self, rows: Tensor):
        self.rows = rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""
        return tuple(self.rows.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of a row."""
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are, and those that are asked for will be."""
        return self.rows.device

    @property
    def rows_per_read(self) -> int:
        """Any number: all are there."""
        return 0

    def expect(self, index: Tensor) -> None:
        """They are there."""

    def gather(self, index: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rows by number [B], into `out` [B, *shape] if there is one."""
        width = math.prod(self.shape[1:])
        rows = self.rows.view(len(self.rows), self.shape[0], width)
        kept = None if out is None else out.view(len(index), self.shape[0], width)
        return functional.gather_rows(rows, index.to(self.device), out=kept).view(len(index), *self.shape)


def collect(
    dataset: Any,
    encode: Encode = lambda images: images,
    *,
    batch_size: int = 64,
    workers: int = 0,
    on_batch: Callable[[int], None] = lambda images: None,
) -> tuple[MemoryRows, Tensor]:
    """Run every image of a dataset through `encode` once, without gradient, and keep what it gives.

    Args:
        dataset: Map-style with a length, or an iterable with one; items are (image tensor, label).
        encode: [n, 3, height, width] → [n, …], such as `SkipCLIP.encode_lower`; the images themselves by default.
        batch_size: Images encoded at once.
        workers: Processes that load images.
        on_batch: Called with the number of images after each batch, for progress.

    Returns:
        What it gave, and the labels [n] int64.

    Raises:
        MemoryError: If the result would take more than half of the memory that is free.
    """
    count = len(dataset)
    labels = torch.empty(count, dtype=torch.int64)
    encoded: Tensor | None = None
    for batch in batches_of(dataset, batch_numbers([range(count)], batch_size), workers=workers):
        with torch.no_grad():
            output = encode(batch.images)
        if encoded is None:
            _check_it_fits(output, count)
            encoded = output.new_empty(count, *output.shape[1:])
        encoded[batch.rows[0] : batch.rows[-1] + 1] = output
        labels[batch.rows[0] : batch.rows[-1] + 1] = batch.labels
        on_batch(len(batch.rows))
    if encoded is None:
        raise ValueError("collect: the dataset has no images.")
    return MemoryRows(encoded), labels


def _check_it_fits(output: Tensor, count: int) -> None:
    needed = output[0].nbytes * count
    free = free_bytes(output.device)
    if needed > free / 2:
        raise MemoryError(
            f"collect: {count} items of {list(output.shape[1:])} {output.dtype} take {needed / 2**30:.1f} GiB, more "
            f"than half of the {free / 2**30:.1f} GiB that are free. Keep them on the disk (--cache), or use fewer "
            "shots or classes, or a smaller model."
        )
