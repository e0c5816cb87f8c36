"""Text features at the cut in a folder: a `features.folder_table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .._progress import Output, progress
from ..digests import digest_tensors
from ..features.folder_table import DTYPE_NAMES, STORED_DTYPES, CacheError, FolderTable, Layout, probe_of
from ..features.writer import TableWriter
from ..folders import is_locked
from ..formatting import escaped

if TYPE_CHECKING:
    from .text_features import TextFeatures


def features_in_folder(folder: Path, features: TextFeatures, probe: Tensor) -> FolderTable:
    """Open the rows [R, W] of all prompts at the cut; compute those that are missing in the folder.

    If another process writes them, this one waits. `probe` has the features [n, W] of a prompt, computed now.

    Raises:
        CacheError: If the folder has the features of other prompts, or of another model below the cut.
    """
    layout = _layout(features, probe)
    if is_locked(folder):
        Output(sys.stderr).write(f"{escaped(folder)}: in use by another process. Waiting for it.\n")
    with TableWriter(folder, layout, resume=True, wait=True) as writer:
        count = sum(len(prompts.tokens) for prompts in features.templates)
        with progress(f"texts → {folder}", count, shown=bool(writer.missing.any())) as advance:
            for chunk in features.chunks(writer.missing):
                writer.write(chunk.first, chunk.rows.cpu())
                advance(chunk.prompt_count)
    return FolderTable.open(folder)


def _layout(features: TextFeatures, probe: Tensor) -> Layout:
    """Return the layout of the rows, and what they depend on: the model below the cut, and the prompts."""
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
