"""Text features at the cut in a folder, for so many classes that memory is not the place for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..console import escaped, progress, stderr
from ..store import (
    COMPUTED,
    DTYPES,
    DifferentStore,
    Layout,
    Store,
    StoreError,
    Writer,
    digest_tensors,
    is_store,
    usable_folder,
)
from .base import TextTower

_SHARD_BYTES = 64 << 20
_NAME_OF = {dtype: name for name, dtype in COMPUTED.items() if name in DTYPES}
# How far features of the same weights may be off, relative to their norm: as those of images in a FeatureCache.
_FEATURES_OFF = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
# How far kept prototypes may be off. The same machine gives the same, or 7e-7 in fp32 where fewer run at once; another
# activation in a single block is off by 2e-3 and more. Those that are too far off are only made again.
_PROTOTYPES_OFF = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}

Lower = Callable[[Tensor], Tensor]
"""Class ids [n] to hidden states at the cut [n, L, W]."""


def telling(text: TextTower) -> Tensor:
    """A few class ids [K]: the first and the last, one with the shortest prompt and one with the longest."""
    ends = text.pooled
    return torch.unique(torch.stack([ends.new_zeros(()), ends.argmin(), ends.argmax(), ends.new_tensor(len(ends) - 1)]))


class TextStore:
    """Rows of all classes at the cut, as they were computed, in a store that is made if it is not there.

    A process that finds another at work on it waits, and takes what that has made.

    Args:
        folder: Where.
        text: Whose rows.
        lower: Below its cut.
        chunk: Classes that run at once.

    Raises:
        StoreError: If the folder holds something else.
    """

    def __init__(self, folder: Path, text: TextTower, lower: Lower, chunk: int):
        self._folder, self._device = usable_folder(folder), text.tokens.device
        folder = self._folder
        self._wanted = _identity(text)
        first = torch.zeros(1, dtype=torch.int64, device=self._device)
        hidden = lower(first)
        shape = 1, hidden.shape[-1]
        try:
            with _store(folder, text.row_count, shape, hidden.dtype, self._wanted) as writer:
                rows = _Joined(_rows(text, lower, chunk, writer, folder))
                for number in writer.missing:
                    of_shard = writer.layout.rows_of(number)
                    writer.write(number, {"rows": rows.take(of_shard).unsqueeze(1)})
        except DifferentStore as error:
            what = f"holds a text_cache that differs in {error.difference}"
            raise StoreError(f"{folder}: {what}. {_remedy(folder)}") from None
        self._store = Store(folder)
        self._probe(text.rows(hidden, first), text.places(first))

    def _probe(self, expected: Tensor, places: Tensor) -> None:
        """Refuse a model that gives other rows although its weights are the same."""
        distance = ((self.gather(places) - expected).double().norm() / expected.double().norm().clamp(min=1e-30)).item()
        if not distance <= _FEATURES_OFF[expected.dtype]:
            raise StoreError(
                f"{self._folder}: holds a text_cache of another model: this one computes other features from the same "
                f"weights ({distance:.1e} off on the first prompt), with another activation, number of heads or hook "
                f"below the cut. {_remedy(self._folder)}"
            )

    def check(self, lower_identity: dict[str, str | int]) -> None:
        """Refuse weights below the cut other than those that the rows are of.

        Raises:
            StoreError: If they are.
        """
        if lower_identity.items() <= self._wanted.items():
            return
        raise StoreError(
            f"{self._folder}: the weights below the cut of the text tower have changed since its features were made. "
            "Make SkipCLIP anew, with another text_cache."
        )

    def gather(self, places: Tensor) -> Tensor:
        """Rows [R, W] by number [R], on the device of the tower."""
        return self._store.gather(places.cpu()).squeeze(1).to(self._device)


def kept_prototypes(folder: Path, text: TextTower, encode: Callable[[Tensor], Tensor]) -> Tensor:
    """Embeddings [C, D] of all classes as they are, from a store; if they are not this model's, or damaged, made again.

    Args:
        folder: Where.
        text: Whose they are.
        encode: Class ids [n] to unit-norm embeddings [n, D].
    """
    parameters = list(text.upper_parameters())
    weights = digest_tensors((str(number), p) for number, p in enumerate(parameters))
    wanted = _identity(text) | {"upper weights": weights}
    prototypes = _sound(folder, wanted)
    if prototypes is not None:
        prototypes = prototypes.to(text.tokens.device)
        few = telling(text)
        coarsest = max((p.dtype for p in parameters), key=lambda dtype: torch.finfo(dtype).eps)
        if (encode(few) - prototypes[few]).norm(dim=-1).max() <= _PROTOTYPES_OFF[coarsest]:
            return prototypes
    prototypes = encode(torch.arange(len(text.tokens), device=text.tokens.device))
    shape = 1, prototypes.shape[1]
    with _store(folder, len(prototypes), shape, prototypes.dtype, wanted, overwrite=True) as writer:
        for number in writer.missing:
            of_shard = writer.layout.rows_of(number)
            writer.write(number, {"rows": prototypes[of_shard.start : of_shard.stop].cpu().unsqueeze(1)})
    return prototypes


def _sound(folder: Path, wanted: dict[str, str | int]) -> Tensor | None:
    """Rows [C, D] of a store that has this fingerprint; None if there is none, and where it is damaged."""
    try:
        store = Store(folder, verify=True)
        rows = store.gather(torch.arange(store.layout.rows)).squeeze(1)
    except StoreError as error:
        if is_store(folder):
            warnings.warn(f"{error} It is made again.", stacklevel=5)
        return None
    return rows if store.layout.fingerprint == wanted else None


def _remedy(folder: Path) -> str:
    return (
        f"Give another text_cache (--cache), or delete {folder.parent}; skipkernels cache build --overwrite does that."
    )


def _identity(text: TextTower) -> dict[str, str | int]:
    """What rows of texts depend on."""
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
        raise StoreError(f"SkipCLIP: text_cache keeps {', '.join(_NAME_OF.values())}; this model computes in {dtype}.")
    name = _NAME_OF[dtype]
    shard_rows = max(_SHARD_BYTES // (shape[1] * dtype.itemsize), 1)
    layout = Layout(rows, shape, name, name, shard_rows, False, fingerprint, {})
    return Writer(folder, layout, resume=not overwrite, overwrite=overwrite, on_wait=_say)


def _say(held: str) -> None:
    stderr().print(f"{held} Waiting for it.", soft_wrap=True)


def _rows(text: TextTower, lower: Lower, chunk: int, writer: Writer, folder: Path) -> Iterator[tuple[int, Tensor]]:
    """(number of the first row, rows [n, W]) of chunks of classes, those left out that no missing shard needs."""
    missing = [writer.layout.rows_of(number) for number in writer.missing]
    if not missing:
        return
    prefix = 0 if text.prompts is None else text.prompts.length
    lengths = torch.full_like(text.pooled, text.tokens.shape[1]) if text.prompts is None else text.pooled + 1 - prefix
    ends = prefix + lengths.cumsum(0).cpu()
    chunks = torch.arange(len(text.tokens)).split(chunk)
    start = 0
    with progress(console=stderr(), transient=True) as bar:
        for ids in bar.track(chunks, description=f"texts → {escaped(folder)}"):
            end = int(ends[ids[-1]])
            if any(part.start < end and start < part.stop for part in missing):
                ids = ids.to(text.tokens.device)
                yield start, text.rows(lower(ids), ids, packed=True)[prefix if start else 0 :].cpu()
            start = end


class _Joined:
    """Ranges of rows that come in pieces, in order."""

    def __init__(self, pieces: Iterator[tuple[int, Tensor]]):
        self._pieces = pieces
        self._start, self._rows = 0, torch.empty(0)

    def take(self, wanted: range) -> Tensor:
        """Rows [n, W] of a range that begins behind the one taken before."""
        parts: list[Tensor] = []
        at = wanted.start
        while at < wanted.stop:
            if at >= self._start + len(self._rows):
                self._start, self._rows = next(self._pieces)
                continue
            part = self._rows[at - self._start : wanted.stop - self._start]
            parts.append(part)
            at += len(part)
        return torch.cat(parts)
