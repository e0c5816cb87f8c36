"""Text features at the cut in a folder: a `features.mapped_table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._progress import Output, progress
from ..digests import digest_tensors
from ..features.layout import NAMES, STORED_DTYPES, CacheError, Layout, probe_of
from ..features.mapped_table import MappedTable
from ..features.writer import TableWriter
from ..folders import is_locked
from ..formatting import escaped

if TYPE_CHECKING:
    from .texts import ClassTexts


def features_in_folder(folder: Path, texts: ClassTexts) -> MappedTable:
    """Rows [R, W] of all prompts at the cut, in a table that is created, completed or opened.

    If another process writes it, this one waits.

    Raises:
        CacheError: If the folder has the features of other prompts, or of another model below the cut.
    """
    first = texts.templates[0].select(torch.zeros(1, dtype=torch.int64, device=texts.device), exact_rows=True)
    probe = texts.compute_features(first)  # [n, W]
    dtype = NAMES[probe.dtype]
    if dtype not in STORED_DTYPES:
        raise CacheError(f"SkipCLIP: text_cache stores fp32, fp16, bf16; this model computes in {probe.dtype}.")
    layout = Layout(texts.row_count, tuple(probe.shape[1:]), dtype, dtype, False, _identity(texts), probe_of(probe))
    if is_locked(folder):
        Output(sys.stderr).write(f"{escaped(folder)}: in use by another process. Waiting for it.\n")
    with TableWriter(folder, layout, resume=True, wait=True) as writer:
        count = len(texts) * len(texts.templates)
        with progress(f"texts → {folder}", count, shown=bool(writer.missing.any())) as advance:
            for start, rows, number in texts.lower_chunks(writer.missing):
                writer.write(start, rows.cpu())
                advance(number)
    return MappedTable.open(folder)


def _identity(texts: ClassTexts) -> dict[str, str | int]:
    """Return what the rows of texts depend on."""
    tensors = [(f"{name} {number}", x) for number, prompts in enumerate(texts.templates)
               for name, x in (("tokens", prompts.tokens), ("pooled", prompts.pooled))]  # fmt: skip
    counts = {"number of classes": len(texts), "templates": len(texts.templates)}
    return texts.tower.lower_identity() | {"prompts": digest_tensors(tensors)} | counts
