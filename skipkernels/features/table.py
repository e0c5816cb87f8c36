"""Tables of features: their interface, rows in memory, and some rows of another table. For a folder: `folder_table`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class FeatureTable(Protocol):
    """Rows of features."""

    shape: tuple[int, ...]  # Shape and dtype of a row that is read
    dtype: torch.dtype

    @property
    def folder(self) -> Path | None:
        """Folder of the rows; None in memory."""
        ...

    def __len__(self) -> int: ...

    def rows(self, row_numbers: Tensor) -> Tensor:
        """Copy rows by number, int64 [B] on any device, to [B, *shape] on the device of the table."""
        ...


class MemoryTable:
    """Rows in memory, on the device of `features` [n, *shape]; see `FeatureTable`."""

    folder = None

    def __init__(self, features: Tensor):
        self.features = features
        self.shape, self.dtype = tuple(features.shape[1:]), features.dtype

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, row_numbers: Tensor) -> Tensor:  # noqa: D102
        return self.features.index_select(0, row_numbers.to(self.features.device))


class SelectedRows:
    """Some rows of another table, by number, int64 [m]; not copied. See `FeatureTable`."""

    def __init__(self, table: FeatureTable, row_numbers: Tensor):
        self._table, self._row_numbers = table, row_numbers.cpu()
        self.folder, self.shape, self.dtype = table.folder, table.shape, table.dtype

    def __len__(self) -> int:
        return len(self._row_numbers)

    def rows(self, row_numbers: Tensor) -> Tensor:  # noqa: D102
        return self._table.rows(self._row_numbers[row_numbers.cpu()])
