"""Small stores of random rows for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipkernels.digests import digest_json
from skipkernels.folders import LOCK
from skipkernels.store import (
    COMPUTED,
    DTYPES,
    MANIFEST,
    Layout,
    Manifest,
    StoreError,
    Writer,
    find_damage,
    quantise,
)


def layout_of(
    dtype: str = "fp32",
    *,
    rows: int = 18,
    shape: tuple[int, ...] = (3, 5),
    computed: str = "fp32",
    shard_rows: int = 4,
    labelled: bool = True,
    weights: str = "these",
) -> Layout:
    """Layout of five shards, the last with two rows."""
    notes = {"probe": [0.1, -2.5e-7], "by": "a test"}
    return Layout(rows, shape, dtype, computed, shard_rows, labelled, {"weights": weights, "seed": 7}, notes)


def labels_of(layout: Layout) -> Tensor:
    return torch.arange(layout.rows) * 3 % 7


def tensors_of(layout: Layout, number: int) -> dict[str, Tensor]:
    """Tensors of a shard."""
    generator = torch.Generator().manual_seed(0)
    features = 5 * torch.randn(layout.rows, *layout.stored_shape, generator=generator)
    part = features[layout.rows_of(number).start : layout.rows_of(number).stop]
    tensors = {"rows": part.to(DTYPES[layout.dtype])}
    if layout.dtype == "int8":
        tensors["rows"], tensors["token_scale"] = quantise(part)
    if layout.labelled:
        tensors["labels"] = labels_of(layout)[layout.rows_of(number).start : layout.rows_of(number).stop]
    return tensors


def truth_of(layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
    """Expected rows of a store."""
    parts = [tensors_of(layout, number) for number in range(layout.shards)]
    rows = torch.cat([part["rows"] for part in parts])
    if layout.dtype == "int8":
        rows = rows.float() * torch.cat([part["token_scale"] for part in parts]).unsqueeze(-1)
    return rows.to(dtype or COMPUTED[layout.computed]).view(layout.rows, *layout.shape)


def fill(folder: Path, layout: Layout, **options: Any) -> list[int]:
    """Build a store, or the missing part of it; returns the numbers of the shards written."""
    with Writer(folder, layout, **options) as writer:
        missing = writer.missing
        for number in missing:
            writer.write(number, tensors_of(writer.manifest.layout, number))
    return missing


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a folder except that of the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK}


def write_manifest(folder: Path, values: Any) -> None:
    """Replace a manifest by other values, with a valid digest."""
    if isinstance(values, dict):
        values = {**values, "xxh3": digest_json({name: value for name, value in values.items() if name != "xxh3"})}
    (folder / MANIFEST).write_text(json.dumps(values))


def listed_shards(folder: Path) -> int:
    """Number of listed shards; asserts that none is damaged."""
    try:
        manifest = Manifest.read(folder)
    except StoreError as error:
        assert "no manifest.json" in str(error)
        return 0
    assert find_damage(folder, manifest) == {}
    return sum(shard is not None for shard in manifest.shards)
