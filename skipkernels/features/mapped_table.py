"""Table of features in a folder, of which the arrays are mapped into memory. `layout` describes the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
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
    map_array,
)

_VERIFIED_BYTES = 32 << 20  # bytes that are read at once to compare all rows with their checksums


class MappedTable:
    """Rows in a folder, mapped into the memory of the CPU; see `FeatureTable`.

    A row is compared with its checksum when it is first read.

    Attributes:
        layout: Contents of identity.json.
        row_checksums: Checksum of each row, [n] uint64; 0 if it is missing.
    """

    def __init__(self, folder: Path, layout: Layout):
        self.folder: Path | None = folder.absolute()  # a later change of the working directory has no effect
        self.layout = layout
        self.shape, self.dtype = layout.shape, COMPUTED_DTYPES[layout.computed_dtype]
        self.row_checksums = map_array(folder / CHECKSUMS, (layout.rows,), np.uint64).numpy().copy()
        self._verified = np.zeros(layout.rows, dtype=bool)
        self._arrays()  # raises now if a file is missing or damaged

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False) -> MappedTable:
        """Open a complete table. With `verify` every row is compared with its checksum.

        Raises:
            CacheError: If there is none, or it is incomplete or damaged.
        """
        table = cls(folder, Layout.read(folder))
        if missing := int((table.row_checksums == 0).sum()):
            done = len(table) - missing
            raise CacheError(
                f"{folder}: incomplete: {done} of {len(table)} rows exist. Build the rest with `resume=True`."
            )
        if verify and (damaged := table.find_damage()):
            raise CacheError(table.damage_message(damaged))
        return table

    def __len__(self) -> int:
        return self.layout.rows

    def rows(self, row_numbers: Tensor) -> Tensor:
        """Copy rows, see `FeatureTable.rows`; a CacheError if one is damaged."""
        index = row_numbers.cpu()
        parts = {name: array.index_select(0, index) for name, array in self._arrays().items()}
        if not self._verified[index].all():
            if damaged := self._mismatches(index.tolist(), list(parts.values())):
                raise CacheError(self.damage_message(damaged))
            self._verified[index] = True
        stored = parts[FEATURES].view(STORED_DTYPES[self.layout.dtype])
        features = dequantise(stored, parts[SCALES]) if SCALES in parts else stored
        return features.to(self.dtype)

    def labels(self) -> Tensor:
        """Labels of all rows, [n] int64."""
        return self._arrays()[LABELS].clone()

    def find_damage(self) -> list[int]:
        """Read all finished rows; return the numbers of those that do not match their checksums."""
        found, step = [], max(_VERIFIED_BYTES // self.layout.row_bytes, 1)
        for start in range(0, len(self), step):
            end = min(start + step, len(self))
            if self.row_checksums[start:end].any():
                found += self._mismatches(range(start, end), [array[start:end] for array in self._arrays().values()])
        return [row for row in found if self.row_checksums[row]]

    def damage_message(self, row_numbers: Sequence[int]) -> str:
        """Message that names damaged rows."""
        named = ", ".join(map(str, row_numbers[:9])) + (", …" if len(row_numbers) > 9 else "")
        return f"{self.folder}: row {named} damaged: bytes have changed. Build it again with `resume=True`."

    def _mismatches(self, row_numbers: Sequence[int], parts: Sequence[Tensor]) -> list[int]:
        """Numbers of the rows with parts [n, …] that do not match their checksums."""
        found = checksums(self.layout.seed, row_numbers, parts)
        return [row for row, checksum in zip(row_numbers, found, strict=True) if checksum != self.row_checksums[row]]

    def _arrays(self) -> dict[str, Tensor]:
        """Map the files, for one call: pages that were read stay in resident memory as long as a map lives."""
        assert self.folder is not None
        return {name: map_array(self.folder / name, *array) for name, array in self.layout.arrays.items()}
