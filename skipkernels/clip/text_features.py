"""Features of prompts at the cut: computed once for all prompts of a task, and again after a change of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..features.table import FeatureTable, MemoryTable
from ..towers.watch import Watch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..towers.prompts import Prompts, SelectedPrompts
    from ..towers.text import TextTower


class Chunk(NamedTuple):
    """Some rows of the table."""

    first: int  # number of the first row
    rows: Tensor  # [n, W]
    prompt_count: int


class TextFeatures:
    """Features at the cut [R, W] of all prompts, in a table: the rows of one template after the other.

    Args:
        tower: Text tower with blocks below the cut.
        templates: The prompts of each template.
        folder: Folder of the table; by default it is in memory.

    Attributes:
        below: Watch of the modules and weights that computed the table.
        row_count: R.
    """

    def __init__(self, tower: TextTower, templates: Sequence[Prompts], folder: Path | None = None):
        self.tower, self.templates, self._folder = tower, templates, folder
        self.below = Watch(tower.lower_parts)
        self._table: FeatureTable | None = None
        self.row_count = 0
        self._first_rows: dict[Prompts, int] = {}
        for prompts in templates:
            self._first_rows[prompts], self.row_count = self.row_count, self.row_count + prompts.row_count

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_table": None}  # not shared with other processes or copies

    def rows(self, selected: Iterable[SelectedPrompts]) -> list[Tensor]:
        """Features [R, W] of some prompts of each template."""
        table, found = self.table(), []
        for of_template in selected:
            start, row_numbers = self._first_rows[of_template.prompts], of_template.row_numbers
            found.append(table.rows(row_numbers + start if start else row_numbers).to(row_numbers.device))
        return found

    def table(self) -> FeatureTable:
        """Features of all prompts; computed again if weights below the cut changed, as far as versions show."""
        if self._table is None or self.below.is_stale():
            with torch.inference_mode(False):  # later steps use them, and these may train
                self._table = self._compute() if self._folder is None else self._open(self._folder)
            self.below.start()
        return self._table

    def _compute(self) -> FeatureTable:
        features: Tensor | None = None
        for chunk in self.chunks():
            if features is None:
                features = chunk.rows.new_empty(self.row_count, chunk.rows.shape[1])
            features[chunk.first : chunk.first + len(chunk.rows)] = chunk.rows
        assert features is not None
        return MemoryTable(features)

    def _open(self, folder: Path) -> FeatureTable:
        from .text_cache import table_in_folder  # most have no folder

        return table_in_folder(folder, self)

    def chunks(self, missing: NDArray[np.bool_] | None = None) -> Iterator[Chunk]:
        """Compute the rows of the table in chunks of prompts; with `missing` [R] only those with missing rows.

        Packed by chunks: hidden states [C, L, W] of whole prompts would take several times as much memory.
        """
        for prompts, start in self._first_rows.items():
            first = start
            ends = (start + prompts.starts + prompts.suffix_lengths).tolist()
            for class_ids in torch.arange(len(ends), device=prompts.starts.device).split(self.tower.cut.chunk):
                end = ends[int(class_ids[-1])]  # the row behind the last suffix
                if missing is None or missing[first:end].any():
                    rows = self.tower.lower(prompts.select(class_ids))
                    # Each chunk begins with the shared prefix, which the table has once, from the first chunk. Rows
                    # may follow the last suffix.
                    skipped = 0 if first == start else prompts.prefix_length
                    yield Chunk(first, rows[skipped : skipped + end - first], len(class_ids))
                first = end

    def drop(self) -> None:
        """Drop the table; the next use computes it."""
        self._table = None
        self.below.stop()

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert a table in memory by `fn`; drop it if its dtype changes, or if it is in a folder."""
        table, self._table = self._table, None
        if isinstance(table, MemoryTable) and (features := fn(table.features)).dtype == table.dtype:
            self._table = MemoryTable(features)
