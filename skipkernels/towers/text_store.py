"""Store text features at the cut and prototypes in a folder, for more classes than fit in memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .._progress import Output, progress
from ..digests import digest_tensors
from ..folders import is_locked
from ..formatting import escaped
from ..reference import widened
from ..store import (
    COMPUTED,
    DTYPES,
    DifferentStore,
    Layout,
    Store,
    StoreError,
    Writer,
    is_store,
)
from .prompts import SelectedPrompts
from .text import TextTower, representative_classes

_SHARD_BYTES = 64 << 20
_NAME_OF = {dtype: name for name, dtype in COMPUTED.items() if name in DTYPES}
# Largest error of features of the same weights, relative to their norm; the same as for images in a FeatureCache.
_FEATURE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# Largest distance between stored and recomputed prototypes; beyond it they are recomputed. On one machine it is at most
# 7e-7 in fp32, with smaller chunks; another activation in one block changes at least 2e-3.
_PROTOTYPE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}

Lower = Callable[[Tensor], Tensor]
"""Class ids [n] to hidden states at the cut [n, L, W]."""


class TextStore:
    """Rows of all classes at the cut, in a store that the constructor creates by `lower`, or opens if it exists.

    If another process is creating it, the constructor waits and then opens it.
    """

    def __init__(self, folder: Path, text: TextTower, lower: Lower, chunk: int):
        self._folder = folder = folder.absolute()
        self._fingerprint = _identity(text)
        first = torch.zeros(1, dtype=torch.int64, device=text.tokens.device)
        hidden = lower(first)
        shape = 1, hidden.shape[-1]
        try:
            with _store(folder, text.prompts.row_count, shape, hidden.dtype, self._fingerprint) as writer:
                if writer.missing:
                    with progress(f"texts → {folder}", len(text.tokens)) as advance:
                        rows = _RowStream(_chunks(text, lower, chunk, writer, advance))
                        for number in writer.missing:
                            of_shard = writer.layout.rows_of(number)
                            writer.write(number, {"rows": rows.read(of_shard).unsqueeze(1)})
        except DifferentStore as error:
            raise StoreError(
                f"{folder}: holds a text_cache that differs in {error.difference}. {_remedy(folder)}"
            ) from None
        self._store = Store(folder)
        self.nbytes = text.prompts.row_count * hidden.shape[-1] * hidden.element_size()
        self._probe(text.prompts.select(first, exact=True), hidden)

    def _probe(self, selected: SelectedPrompts, hidden: Tensor) -> None:
        """Refuse a model that computes other rows from the same weights."""
        expected, stored = selected.pack(hidden), self.gather(selected.row_numbers)
        distance = (widened(stored - expected).norm() / widened(expected).norm().clamp(min=1e-30)).item()
        if not distance <= _FEATURE_TOLERANCE[expected.dtype]:
            raise StoreError(
                f"{self._folder}: holds a text_cache of another model: the weights are equal, but the features of the "
                f"first prompt differ by {distance:.1e}, so an activation, the number of heads or a hook below the cut "
                f"differs. {_remedy(self._folder)}"
            )

    def check(self, lower_identity: dict[str, str | int]) -> None:
        """Refuse weights below the cut that differ from those that computed the rows."""
        if lower_identity.items() <= self._fingerprint.items():
            return
        raise StoreError(
            f"{self._folder}: the weights below the cut of the text tower have changed since its features were "
            "computed. Create SkipCLIP again with another text_cache."
        )

    def gather(self, row_numbers: Tensor) -> Tensor:
        """Gather rows [R, W] by index, on the device of the index."""
        return self._store.gather(row_numbers.cpu()).squeeze(1).to(row_numbers.device)


def stored_prototypes(folder: Path, text: TextTower, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Embeddings [C, D] of all classes from a store, recomputed by `encode` if damaged or of another model."""
    parameters = list(text.upper_parameters())
    weights = digest_tensors((str(number), p) for number, p in enumerate(parameters))
    fingerprint = _identity(text) | {"upper weights": weights}
    prototypes = _load_rows(folder, fingerprint)
    if prototypes is not None:
        prototypes = prototypes.to(text.tokens.device)
        sample = representative_classes(text)
        coarsest = max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)
        if (encode(sample) - prototypes[sample]).norm(dim=-1).max() <= _PROTOTYPE_TOLERANCE[coarsest]:
            return prototypes
    prototypes = encode(torch.arange(len(text.tokens), device=text.tokens.device))
    shape = 1, prototypes.shape[1]
    with _store(folder, len(prototypes), shape, prototypes.dtype, fingerprint, overwrite=True) as writer:
        for number in writer.missing:
            of_shard = writer.layout.rows_of(number)
            writer.write(number, {"rows": prototypes[of_shard.start : of_shard.stop].cpu().unsqueeze(1)})
    return prototypes


def _load_rows(folder: Path, fingerprint: dict[str, str | int]) -> Tensor | None:
    """Rows [C, D] of a store with this fingerprint; None if the store does not exist, differs or is damaged."""
    try:
        store = Store(folder, verify=True)
        rows = store.gather(torch.arange(store.layout.rows)).squeeze(1)
    except StoreError as error:
        if is_store(folder):
            warnings.warn(f"{error} The prototypes are recomputed.", stacklevel=5)
        return None
    return rows if store.layout.fingerprint == fingerprint else None


def _remedy(folder: Path) -> str:
    return (
        f"Give another text_cache (--cache), or delete {folder.parent}; skipkernels cache build --overwrite does that."
    )


def _identity(text: TextTower) -> dict[str, str | int]:
    """Fingerprint of everything that the rows of texts depend on."""
    prompts = digest_tensors([("tokens", text.tokens), ("pooled", text.pooled)])
    return text.lower_identity() | {"prompts": prompts, "number of classes": len(text.tokens)}


def _store(
    folder: Path,
    rows: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    fingerprint: dict[str, str | int],
    *,
    overwrite: bool = False,
) -> Writer:
    if dtype not in _NAME_OF:
        raise StoreError(f"SkipCLIP: text_cache stores {', '.join(_NAME_OF.values())}; this model computes in {dtype}.")
    name = _NAME_OF[dtype]
    shard_rows = max(_SHARD_BYTES // (shape[1] * dtype.itemsize), 1)
    layout = Layout(rows, shape, name, name, shard_rows, False, fingerprint, {})
    if is_locked(folder):
        Output(sys.stderr).write(f"{escaped(folder)}: in use by another process. Waiting for it.\n")
    return Writer(folder, layout, resume=not overwrite, overwrite=overwrite, wait=True)


def _chunks(
    text: TextTower, lower: Lower, chunk: int, writer: Writer, advance: Callable[[float], None]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first row, rows [n, W]) of each chunk of classes that a missing shard needs."""
    missing = [writer.layout.rows_of(number) for number in writer.missing]
    prompts = text.prompts
    ends = (prompts.starts + prompts.lengths).cpu()
    start = 0
    for ids in torch.arange(len(text.tokens)).split(chunk):
        end = int(ends[ids[-1]])
        if any(part.start < end and start < part.stop for part in missing):
            ids = ids.to(text.tokens.device)
            yield start, prompts.pack(lower(ids), ids)[prompts.prefix_length if start else 0 :].cpu()
        advance(len(ids))
        start = end


class _RowStream:
    """Reader of ranges of rows, in order, from consecutive chunks."""

    def __init__(self, chunks: Iterator[tuple[int, Tensor]]):
        self._chunks = chunks
        self._start, self._rows = 0, torch.empty(0)

    def read(self, rows: range) -> Tensor:
        """Read a range of rows [n, W], which must follow the range read before."""
        parts: list[Tensor] = []
        start = rows.start
        while start < rows.stop:
            if start >= self._start + len(self._rows):
                self._start, self._rows = next(self._chunks)
                continue
            part = self._rows[start - self._start : rows.stop - self._start]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)
