"""Text features at the cut, and prototypes, in a folder: tables of `features.table`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._progress import Output, progress
from ..checks import warn_caller
from ..digests import digest_tensors
from ..features.identity import PROBE_TOLERANCE, relative_distance
from ..features.table import COMPUTED_DTYPES, IDENTITY, STORED_DTYPES, CacheError, Layout, MappedTable
from ..features.writer import TableWriter
from ..folders import is_locked
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
    layout = _layout(texts.row_count, probe, _identity(texts))
    remedy = f"Give another text_cache (--cache), or delete {folder.parent}."
    if (folder / IDENTITY).exists() and (difference := Layout.read(folder).difference(layout)):
        raise CacheError(f"{folder}: holds a text_cache that differs in {difference}. {remedy}")
    with _writer(folder, layout, resume=True) as writer:
        count = len(texts) * len(texts.templates)
        with progress(f"texts → {folder}", count, shown=bool(writer.missing.any())) as advance:
            for start, rows, number in texts.lower_chunks(writer.missing):
                writer.write(start, rows.cpu())
                advance(number)
    table = MappedTable.open(folder)
    distance = relative_distance(table.rows(first.row_numbers), probe)
    if not distance <= PROBE_TOLERANCE[probe.dtype]:
        raise CacheError(
            f"{folder}: holds a text_cache of another model: the weights are equal, but the features of the first "
            f"prompt differ by {distance:.1e}: another activation, number of heads or hook below the cut. {remedy}"
        )
    return table


def prototypes_in_folder(folder: Path, texts: ClassTexts) -> Tensor:
    """Embeddings [C, D] of all classes from a table, computed if it is missing, damaged or of another model."""
    parameters = list(texts.tower.upper_parameters())
    weights = digest_tensors((str(number), p) for number, p in enumerate(parameters))
    sample = representative_classes(texts.templates[0])
    found = texts.embeddings(sample)  # [n, D]
    layout = _layout(len(texts), found, _identity(texts) | {"upper weights": weights})
    stored = _stored_rows(folder, layout)
    if stored is not None:
        stored = stored.to(texts.device)
        coarsest = max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)
        if (found - stored[sample]).norm(dim=-1).max() <= _PROTOTYPE_TOLERANCE[coarsest]:
            return stored
    prototypes = texts.embeddings()
    with _writer(folder, layout, resume=False) as writer:
        writer.write(0, prototypes.cpu())
    return prototypes


def _stored_rows(folder: Path, layout: Layout) -> Tensor | None:
    """All rows of a table with this layout; None if there is none, or another, or a damaged one."""
    try:
        if Layout.read(folder).difference(layout) is None:
            return MappedTable.open(folder, verify=True).rows(torch.arange(layout.rows))
    except CacheError as error:
        if (folder / IDENTITY).exists():
            warn_caller(f"{error} The prototypes are computed again.")
    return None


def _identity(texts: ClassTexts) -> dict[str, str | int]:
    """Return what the rows of texts depend on."""
    tensors = [(f"{name} {number}", x) for number, prompts in enumerate(texts.templates)
               for name, x in (("tokens", prompts.tokens), ("pooled", prompts.pooled))]  # fmt: skip
    counts = {"number of classes": len(texts), "templates": len(texts.templates)}
    return texts.tower.lower_identity() | {"prompts": digest_tensors(tensors)} | counts


def _layout(rows: int, like: Tensor, identity: dict[str, str | int]) -> Layout:
    """Layout of rows like those of a tensor [n, W], in its dtype."""
    names = {dtype: name for name, dtype in COMPUTED_DTYPES.items() if name in STORED_DTYPES}
    if like.dtype not in names:
        raise CacheError(
            f"SkipCLIP: text_cache stores {', '.join(names.values())}; this model computes in {like.dtype}."
        )
    name = names[like.dtype]
    return Layout(rows, tuple(like.shape[1:]), name, name, False, identity)


def _writer(folder: Path, layout: Layout, *, resume: bool) -> TableWriter:
    if is_locked(folder):
        Output(sys.stderr).write(f"{escaped(folder)}: in use by another process. Waiting for it.\n")
    return TableWriter(folder, layout, resume=resume, overwrite=not resume, wait=True)
