"""Text features at the cut in a folder, a `features.mapped_table`, and the prototypes in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._progress import Output, progress
from ..digests import digest_json, digest_tensors
from ..features.layout import NAMES, STORED_DTYPES, CacheError, Layout, probe_of
from ..features.mapped_table import MappedTable
from ..features.writer import TableWriter, disk_errors
from ..folders import is_locked, replace_tensors
from ..formatting import escaped
from ..towers.text import representative_classes

if TYPE_CHECKING:
    from .texts import ClassTexts

# Largest distance between stored and recomputed prototypes; beyond it they are recomputed. On one machine it is at most
# 7e-7 in fp32, with smaller chunks; another activation in one block changes at least 2e-3.
_PROTOTYPE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


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


def prototypes_in_file(path: Path, texts: ClassTexts) -> Tensor:
    """Embeddings [C, D] of all classes from a file; computed if it is missing, damaged or of another model."""
    parameters = list(texts.tower.upper_parameters())
    weights = digest_tensors((str(number), p) for number, p in enumerate(parameters))
    identity = digest_json(_identity(texts) | {"upper weights": weights})
    sample = representative_classes(texts.templates[0])
    found = texts.embeddings(sample)  # [n, D]
    stored = _stored(path, identity)
    if stored is not None:
        stored = stored.to(texts.device)
        coarsest = max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)
        if (found - stored[sample]).norm(dim=-1).max() <= _PROTOTYPE_TOLERANCE[coarsest]:
            return stored
    prototypes = texts.embeddings()
    with disk_errors(path.parent):
        replace_tensors(path, {"prototypes": prototypes}, {"xxh3": digest_tensors([(identity, prototypes)])})
    return prototypes


def _stored(path: Path, identity: str) -> Tensor | None:
    """Prototypes in a file, if their digest is that of undamaged ones with this identity."""
    try:
        with safe_open(path, "pt") as file:
            stored = file.get_tensor("prototypes")
            return stored if file.metadata()["xxh3"] == digest_tensors([(identity, stored)]) else None
    except (OSError, SafetensorError, LookupError, TypeError):
        return None


def _identity(texts: ClassTexts) -> dict[str, str | int]:
    """Return what the rows of texts depend on."""
    tensors = [(f"{name} {number}", x) for number, prompts in enumerate(texts.templates)
               for name, x in (("tokens", prompts.tokens), ("pooled", prompts.pooled))]  # fmt: skip
    counts = {"number of classes": len(texts), "templates": len(texts.templates)}
    return texts.tower.lower_identity() | {"prompts": digest_tensors(tensors)} | counts
