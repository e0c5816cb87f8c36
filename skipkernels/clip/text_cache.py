"""Text features at the cut in a folder: a `features.folder_table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .._progress import Output, progress
from ..digests import digest_tensors
from ..features.folder_table import FolderTable
from ..features.layout import NAMES, STORED_DTYPES, CacheError, Layout, probe_of
from ..features.writer import TableWriter
from ..folders import is_locked
from ..formatting import escaped

if TYPE_CHECKING:
    from .text_features import TextFeatures


def features_in_folder(folder: Path, features: TextFeatures, probe: Tensor) -> FolderTable:
    """Rows [R, W] of all prompts at the cut, in a table that is created, completed or opened.

    If another process writes it, this one waits. `probe` has features [n, W] of a prompt, computed now.

    Raises:
        CacheError: If the folder has the features of other prompts, or of another model below the cut.
    """
    dtype = NAMES[probe.dtype]
    if dtype not in STORED_DTYPES:
        raise CacheError(f"SkipCLIP: text_cache stores fp32, fp16, bf16; this model computes in {probe.dtype}.")
    shape, identity = tuple(probe.shape[1:]), _identity(features)
    layout = Layout(features.row_count, shape, dtype, dtype, False, identity, probe_of(probe))
    if is_locked(folder):
        Output(sys.stderr).write(f"{escaped(folder)}: in use by another process. Waiting for it.\n")
    with TableWriter(folder, layout, resume=True, wait=True) as writer:
        count = sum(len(prompts.tokens) for prompts in features.templates)
        with progress(f"texts → {folder}", count, shown=bool(writer.missing.any())) as advance:
            for start, rows, number in features.chunks(writer.missing):
                writer.write(start, rows.cpu())
                advance(number)
    return FolderTable.open(folder)


def _identity(features: TextFeatures) -> dict[str, str | int]:
    """Return what the rows depend on."""
    templates = features.templates
    tensors = [(f"{name} {number}", x) for number, prompts in enumerate(templates)
               for name, x in (("tokens", prompts.tokens), ("pooled", prompts.pooled))]  # fmt: skip
    counts = {"number of classes": len(templates[0].tokens), "templates": len(templates)}
    return features.tower.lower_identity() | {"prompts": digest_tensors(tensors)} | counts
