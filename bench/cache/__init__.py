"""Benchmarks of the feature cache: building, reading, dtypes."""

from __future__ import annotations

from pathlib import Path

import torch

from skipkernels.store import COMPUTED, DTYPES, Layout, Writer
from skipkernels.store.shards import quantise

SHAPE = (197, 768)  # shape of the features of an image in ViT-B/16


def random_store(folder: Path, images: int, dtype: str) -> Layout:
    """Write a complete store of random features."""
    generator = torch.Generator().manual_seed(0)
    fingerprint: dict[str, str | int] = {"number of images": images, "number of views": 1}
    rows = (128 << 20) // (SHAPE[0] * SHAPE[1] * DTYPES[dtype].itemsize)
    layout = Layout(images, SHAPE, dtype, "fp32", rows, True, fingerprint, {})
    with Writer(folder, layout) as writer:
        for number in writer.missing:
            numbers = torch.randn(len(layout.rows_of(number)), *SHAPE, generator=generator)
            tensors = {"labels": torch.arange(layout.rows_of(number).start, layout.rows_of(number).stop) // 16}
            if dtype == "int8":
                tensors["rows"], tensors["token_scale"] = quantise(numbers)
            else:
                tensors["rows"] = numbers.to(DTYPES[dtype])
            writer.write(number, tensors)
    return layout


def moved_bytes(layout: Layout, out: torch.dtype = COMPUTED["fp32"]) -> int:
    """Bytes read and written for the features of one image."""
    tokens, width = layout.stored_shape
    return layout.row_bytes + tokens * width * out.itemsize
