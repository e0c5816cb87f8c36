"""Table of features in a folder. `layout` describes the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .layout import (
    CHECKSUMS,
    COMPUTED_DTYPES,
    FEATURES,
    LABELS,
    SCALES,
    STORED_DTYPES,
    CacheError,
    Layout,
    checksums,
    dequantise,
    read_rows,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_VERIFIED_BYTES = 32 << 20  # bytes that are read at once to compare all rows with their checksums


class FolderTable:
    """Rows in a folder, read into the memory of the CPU; see `FeatureTable`.

    A row is compared with its checksums whenever it is read.

    Attributes:
        layout: Contents of identity.json.
        finished: False for each missing row, [n] bool.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder: Path | None = folder.absolute()  # a later change of the working directory has no effect
        self.layout = layout
        self.shape, self.dtype = layout.shape, COMPUTED_DTYPES[layout.computed_dtype]
        self._checksums = read_rows(folder / CHECKSUMS, *layout.checksum_array, range(layout.rows))  # [n, arrays]
        self.finished = (self._checksums != 0).all(axis=1)
        for name in layout.arrays:  # raises now if a file is missing or damaged
            self._read(name, [])

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> FolderTable:
        """Open a complete table. With `verify` every row is compared with its checksums.

        Raises:
            CacheError: If there is none, or it is incomplete or damaged.
        """
        table = cls(folder, Layout.read(folder))
        if (done := int(table.finished.sum())) < len(table):
            raise CacheError(
                f"{folder}: incomplete: {done} of {len(table)} rows exist. Build the rest with `resume=True`."
            )
        if verify and (damaged := table.find_damage()):
            raise CacheError(table.damage_message(damaged))
        return table

    def __len__(self) -> int:
        return self.layout.rows

    def rows(self, row_numbers: Tensor) -> Tensor:
        """Read rows, see `FeatureTable.rows`; a CacheError if one is damaged."""
        numbers = row_numbers.tolist()
        parts = {name: self._read(name, numbers) for name in self.layout.arrays if name != LABELS}
        self._verify(numbers, parts)
        stored = torch.from_numpy(parts[FEATURES]).view(STORED_DTYPES[self.layout.dtype])
        features = dequantise(stored, torch.from_numpy(parts[SCALES])) if SCALES in parts else stored
        return features.to(self.dtype)

    def labels(self) -> Tensor:
        """Labels of all rows, [n] int64; a CacheError if one is damaged."""
        numbers = range(len(self))
        labels = self._read(LABELS, numbers)
        self._verify(numbers, {LABELS: labels})
        return torch.from_numpy(labels)

    def find_damage(self) -> list[int]:
        """Read all finished rows; return the numbers of those that do not match their checksums."""
        found, step = [], max(_VERIFIED_BYTES // self.layout.row_bytes, 1)
        for start in range(0, len(self), step):
            numbers = range(start, min(start + step, len(self)))
            if self.finished[start : numbers.stop].any():
                found += self._mismatches(numbers, {name: self._read(name, numbers) for name in self.layout.arrays})
        return [row for row in found if self.finished[row]]

    def damage_message(self, row_numbers: Sequence[int]) -> str:
        """Message that names damaged rows."""
        named = ", ".join(map(str, row_numbers[:9])) + (", …" if len(row_numbers) > 9 else "")
        return f"{self.folder}: row {named} damaged: bytes have changed. Build it again with `resume=True`."

    def _read(self, name: str, row_numbers: Sequence[int]) -> NDArray[Any]:
        assert self.folder is not None
        return read_rows(self.folder / name, *self.layout.arrays[name], row_numbers)

    def _verify(self, row_numbers: Sequence[int], parts: dict[str, NDArray[Any]]) -> None:
        if damaged := self._mismatches(row_numbers, parts):
            raise CacheError(self.damage_message(damaged))

    def _mismatches(self, row_numbers: Sequence[int], parts: dict[str, NDArray[Any]]) -> list[int]:
        """Numbers of the rows of some arrays, by file name, that do not match their checksums."""
        numbers, wrong = np.asarray(row_numbers, np.int64), np.zeros(len(row_numbers), dtype=bool)
        for column, name in enumerate(self.layout.arrays):
            if name in parts:
                found = checksums(self.layout.seed, row_numbers, parts[name])
                wrong |= found != self._checksums[numbers, column]
        return numbers[wrong].tolist()
