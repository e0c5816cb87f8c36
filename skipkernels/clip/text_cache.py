"""Text features at the cut in a folder: a `features.folder_table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._progress import Output, progress
from ..digests import digest_tensors
from ..features.folder_table import DTYPE_NAMES, STORED_DTYPES, CacheError, FolderTable, Layout, probe_of
from ..features.table import FeatureTable, MemoryTable
from ..features.writer import TableWriter
from ..folders import is_locked
from ..formatting import escaped

if TYPE_CHECKING:
    from .text_features import TextFeatures


# Largest features of a folder that are read into the memory of a GPU: those of about 40,000 classes of ViT-B.
_BYTES_ON_GPU = 256 << 20


def table_in_folder(folder: Path, features: TextFeatures) -> FeatureTable:
    """Open the rows [R, W] of all prompts at the cut in a folder; compute those that are missing.

    A small table is read into the memory of a GPU, so that no step waits.

    Raises:
        CacheError: If the folder has the features of other prompts, or of another model below the cut.
    """
    device = features.templates[0].tokens.device
    table = _complete(folder / "features", features)
    if device.type == "cpu" or len(table) * table.layout.row_bytes > _BYTES_ON_GPU:
        return table
    return MemoryTable(table.rows(torch.arange(len(table), device="cpu")).to(device))


def _complete(folder: Path, features: TextFeatures) -> FolderTable:
    """Compute the rows that are missing in a folder. If another process writes them, this one waits."""
    prompts = features.templates[0]
    first = prompts.select(torch.zeros(1, dtype=torch.int64, device=prompts.tokens.device))
    layout = _layout(features, probe=features.tower.lower(first)[: first.last_rows[0] + 1])
    if is_locked(folder):
        Output(sys.stderr).write(f"{escaped(folder)}: in use by another process. Waiting for it.\n")
    with TableWriter(folder, layout, resume=True, wait=True) as writer:
        count = sum(len(each.tokens) for each in features.templates)
        with progress(f"texts → {folder}", count, shown=bool(writer.missing.any())) as advance:
            for chunk in features.chunks(writer.missing):
                writer.write(chunk.first, chunk.rows.cpu())
                advance(chunk.prompt_count)
    return FolderTable.open(folder)


def _layout(features: TextFeatures, probe: Tensor) -> Layout:
    """Return the layout of the rows, and what they depend on: the model below the cut, and the prompts.

    `probe` has the features [n, W] of a prompt, computed now.
    """
    dtype = DTYPE_NAMES[probe.dtype]
    if dtype not in STORED_DTYPES:
        raise CacheError(f"SkipCLIP: text_cache stores fp32, fp16, bf16; this model computes in {probe.dtype}.")
    templates = features.templates
    tensors = []
    for number, prompts in enumerate(templates):
        tensors += [(f"tokens {number}", prompts.tokens), (f"pooled {number}", prompts.pooled)]
    return Layout(
        rows=features.row_count,
        shape=tuple(probe.shape[1:]),
        dtype=dtype,
        computed_dtype=dtype,
        labelled=False,
        identity={
            **features.tower.lower_identity(),
            "prompts": digest_tensors(tensors),
            "number of classes": len(templates[0].tokens),
            "templates": len(templates),
        },
        probe=probe_of(probe),
    )
