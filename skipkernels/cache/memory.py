"""A whole dataset in memory: right for few-shot sets, refused where it would not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

_MEMORY_INFO = Path("/proc/meminfo")  # Linux


def collect(
    dataset: Any,
    encode: Callable[[Tensor], Tensor] = lambda images: images,
    *,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda images: None,
) -> TensorDataset:
    """Run every image of a dataset through `encode` once, without gradient, and keep what it gives.

    Args:
        dataset: Map-style, with a length; items are (image tensor, label).
        encode: [n, 3, height, width] → [n, …], such as `SkipCLIP.encode_lower`; the images themselves by default.
        batch_size: Images encoded at once.
        on_batch: Called with the number of images after each batch, for progress.

    Returns:
        TensorDataset: (encoded [n, …], labels [n] int64).

    Raises:
        MemoryError: If the result would take more than half of the memory that is free.
    """
    count, filled = len(dataset), 0
    labels = torch.empty(count, dtype=torch.int64)
    encoded: Tensor | None = None
    for images, batch_labels in DataLoader(dataset, batch_size=batch_size):
        with torch.no_grad():
            output = encode(images)
        if encoded is None:
            _check_it_fits(output, count)
            encoded = output.new_empty(count, *output.shape[1:])
        encoded[filled : filled + len(images)] = output
        labels[filled : filled + len(images)] = batch_labels
        filled += len(images)
        on_batch(len(images))
    if encoded is None:
        raise ValueError("collect: the dataset has no images.")
    return TensorDataset(encoded, labels)


def _check_it_fits(output: Tensor, count: int) -> None:
    needed = output[0].nbytes * count
    if output.is_cuda:
        free = torch.cuda.mem_get_info(output.device)[0]
    elif _MEMORY_INFO.exists():
        available = next(line for line in _MEMORY_INFO.read_text().splitlines() if line.startswith("MemAvailable"))
        free = int(available.split()[1]) * 1024
    else:
        return
    if needed > free / 2:
        raise MemoryError(
            f"collect: {count} items of {list(output.shape[1:])} {output.dtype} take {needed / 2**30:.1f} GiB, more "
            f"than half of the {free / 2**30:.1f} GiB that are free. Use fewer shots or classes, or a smaller model."
        )
