"""Embedding of the classes: features at the cut of their prompts, computed once, and the text tower above the cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..features.table import FeatureTable, MemoryTable
from ..reference import autocast_dtype, unit_norm
from ..towers.modes import evaluating
from ..towers.text import SelectedPrompts, TextTower
from ..towers.watch import Watched

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Largest features of a folder that are read into the memory of a GPU: those of about 40,000 classes of ViT-B.
_BYTES_ON_GPU = 256 << 20


class _Kept(NamedTuple):
    """Embeddings of all classes, with what they were computed by."""

    embeddings: Tensor  # [C, D]
    autocast: torch.dtype | None
    above: Watched  # modules and weights above the cut

    def is_valid(self, autocast: torch.dtype | None) -> bool:
        """Return True if an evaluation would compute the same embeddings, by contents and settings above the cut.

        Contents, since a write through `.data` changes no version. A step compares versions alone, see
        `ClassTexts.table`: it should not read all weights.
        """
        return self.autocast == autocast and self.above.is_comparable() and not self.above.compare()


class ClassTexts:
    """Texts of C classes.

    With T templates a class has T prompts. The prompts of a template are a group of rows in one table, with the prefix
    that they share. The embedding of a class is the mean of the unit-norm embeddings of its prompts.

        embeddings of               gradient   norm   kept
        encode, encode_template     yes        any    no
        compute_embeddings          no         1      no
        kept_embeddings             no         1      until a change of weights, settings or autocast
        prototypes                  no         1      always

    Args:
        tower: Text tower, cut.
        tokens: [C, L] or [C, T, L], on the device of the tower.
        folder: Folder of the features and prototypes; by default they are in memory.
        keeps_features: False computes features in each call, for prompts that are used once.

    Attributes:
        templates: The prompts of each template.
        prototypes: [C, D] unit-norm embeddings from before tuning, at least fp32; set by `compute_prototypes`.
        watched: Modules and weights that computed the features; None before.
    """

    prototypes: Tensor

    def __init__(self, tower: TextTower, tokens: Tensor, folder: Path | None = None, *, keeps_features: bool = True):
        self.tower, self.folder, self.keeps_features = tower, folder, keeps_features
        if folder is not None and tower.skip == 0:
            raise ValueError("SkipCLIP: text_cache keeps features at the cut, and with skip_layers=0 there is no cut.")
        of_templates = tokens.unbind(1) if tokens.ndim == 3 else [tokens]
        self.templates = [tower.read_prompts(x.contiguous()) for x in of_templates]
        # Features at the cut [R, W] of all prompts, one template after the other; None before they are computed
        self._table: FeatureTable | None = None
        self.watched: Watched | None = None
        # First row of each template
        self._starts = [0, *itertools.accumulate(prompts.row_count for prompts in self.templates[:-1])]
        self._kept: _Kept | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_table": None, "_kept": None}  # not shared with other processes or copies

    def __len__(self) -> int:
        return len(self.templates[0].tokens)

    @property
    def device(self) -> torch.device:
        """Device of the prompts and of the tower above the cut."""
        return self.templates[0].tokens.device

    @property
    def class_ids(self) -> Tensor:
        """Ids [C] of all classes."""
        return torch.arange(len(self), device=self.device)

    # ---- encoding ----------------------------------------------------------------------------------------------------

    def encode(self, class_ids: Tensor, *, exact_rows: bool = False) -> Tensor:
        """Class ids [K] to text embeddings [K, D], any norm; for `exact_rows` see `Prompts.select`."""
        with parametrize.cached():  # low-rank updates once, not for each template
            embeddings = [self.encode_template(t, class_ids, exact_rows=exact_rows) for t in range(len(self.templates))]
        if len(embeddings) == 1:
            return embeddings[0]
        return torch.stack([unit_norm(x) for x in embeddings]).mean(0).to(embeddings[0].dtype)

    def encode_template(self, template: int, class_ids: Tensor, *, exact_rows: bool = False) -> Tensor:
        """Class ids [K] to the embeddings [K, D] of their prompts of one template, any norm."""
        selected = self.templates[template].select(class_ids, exact_rows=exact_rows)
        return self.tower.upper(self._features_of(template, selected), selected)

    def kept_embeddings(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes in evaluation mode, without gradient; kept until a change."""
        autocast = autocast_dtype(self.device)
        self.check_contents()
        if self._kept is not None and self._kept.is_valid(autocast):
            return self._kept.embeddings
        with torch.inference_mode(False):
            embeddings = self.compute_embeddings(self.class_ids)
        self._kept = _Kept(embeddings, autocast, Watched(self.tower.upper_parts))
        return embeddings

    def compute_embeddings(self, class_ids: Tensor) -> Tensor:
        """Unit-norm embeddings [n, D] of classes in evaluation mode, at least fp32, without gradient, in chunks."""
        with evaluating([self.tower.model]), torch.no_grad(), parametrize.cached():
            of_templates = [
                unit_norm(torch.cat([self.encode_template(t, ids) for ids in class_ids.split(self.tower.cut.chunk)]))
                for t in range(len(self.templates))
            ]
        return of_templates[0] if len(of_templates) == 1 else unit_norm(torch.stack(of_templates).mean(0))

    def compute_prototypes(self) -> None:
        """Set `prototypes`, with the current weights, or from the folder."""
        if self.folder is None:
            self.prototypes = self.compute_embeddings(self.class_ids)
        else:
            from .text_cache import prototypes_in_folder

            self.prototypes = prototypes_in_folder(self.folder / "prototypes", self)

    def others(self, tokens: Tensor) -> ClassTexts:
        """Return the texts of other prompts [n, L] or [n, T, L], by the same tower; their features are not kept."""
        return ClassTexts(self.tower, tokens.to(self.device, torch.int64), keeps_features=False)

    # ---- features at the cut -----------------------------------------------------------------------------------------

    def _features_of(self, template: int, selected: SelectedPrompts) -> Tensor:
        """Features [R, W] of prompts at the cut, from the table if they are kept."""
        if self.tower.skip == 0 or not self.keeps_features:
            return self.compute_features(selected)
        start = self._starts[template]
        row_numbers = selected.row_numbers + start if start else selected.row_numbers  # [R]
        return self.table().rows(row_numbers).to(self.device)

    def compute_features(self, selected: SelectedPrompts) -> Tensor:
        """Compute the features [R, W] of prompts at the cut."""
        # Kept features are those of a step without autocast.
        autocast = torch.autocast(self.device.type, enabled=False) if self.tower.skip > 0 else nullcontext()
        with autocast:
            return selected.pack(self.tower.lower(selected.tokens, selected.prompts))

    def table(self) -> FeatureTable:
        """Features at the cut [R, W] of all prompts; computed again if weights below it changed."""
        if self._table is None or self.is_stale():
            self._kept = None
            with torch.inference_mode(False), torch.enable_grad():  # used beyond the caller's context
                self._table = self._compute_table() if self.folder is None else self._open_table(self.folder)
            self.watched = Watched(self.tower.lower_parts)
        return self._table

    def _compute_table(self) -> FeatureTable:
        features: Tensor | None = None
        for first, rows, _ in self.compute_chunks():
            if features is None:
                features = rows.new_empty(self.row_count, rows.shape[1])
            features[first : first + len(rows)] = rows
        assert features is not None
        return MemoryTable(features)

    def _open_table(self, folder: Path) -> FeatureTable:
        """Open the features in a folder; a small table is read into the memory of a GPU, so that no step waits."""
        from .text_cache import features_in_folder

        table = features_in_folder(folder / "features", self)
        if self.device.type == "cpu" or len(table) * table.layout.row_bytes > _BYTES_ON_GPU:
            return table
        return MemoryTable(table.rows(torch.arange(len(table))).to(self.device))

    def step_tensors(self) -> list[Tensor | None]:
        """Tensors that a step reads, besides those of the model; None in place of features in a folder."""
        layouts = [x for prompts in self.templates for x in prompts.tensors().values()]
        features = [self.table().features] if self.tower.skip > 0 else []
        return [self.prototypes, *layouts, *features]

    def reads_folder(self) -> bool:
        """Return True if each step reads the features of its classes from the folder, which on a GPU is a host sync."""
        return self.folder is not None and self.table().features is None

    @property
    def row_count(self) -> int:
        """R, the number of rows of all prompts."""
        return sum(prompts.row_count for prompts in self.templates)

    def compute_chunks(self, missing: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, Tensor, int]]:
        """Yield (first row, features [n, W], number of prompts) of each chunk, or of those with `missing` rows, [R].

        Packed by chunks: hidden states [C, L, W] of whole prompts would take several times as much memory.
        """
        for start, prompts in zip(self._starts, self.templates, strict=True):
            first, ends = start, (start + prompts.starts + prompts.suffix_lengths).tolist()
            for class_ids in self.class_ids.split(self.tower.cut.chunk):
                end = ends[int(class_ids[-1])]  # the row behind the last suffix
                if missing is None or missing[first:end].any():
                    rows = self.compute_features(prompts.select(class_ids, exact_rows=True))
                    # Each chunk begins with the shared prefix, which is stored once, with the first of them.
                    yield first, rows if first == start else rows[prompts.prefix_length :], len(class_ids)
                first = end

    # ---- changes -----------------------------------------------------------------------------------------------------

    def is_stale(self) -> bool:
        """Return True if the features were computed with other weights."""
        return self.watched is not None and self.watched.is_stale()

    def check_contents(self) -> None:
        """Compare contents and settings below the cut, and drop what is kept if they differ."""
        if self.watched is not None and self.watched.compare():
            self.drop()

    def drop(self) -> None:
        """Drop the features and embeddings that are kept."""
        self._table = self._kept = None

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the tensors that belong to no module by `fn`; features in memory stay if their dtype does."""
        table = self._table
        self.drop()
        for prompts in self.templates:
            prompts.apply(fn)
        self.prototypes = in_same_dtype(fn, self.prototypes)
        self._table = None if table is None else table.converted(fn)


class FixedTexts(ClassTexts):
    """Texts that do not train: the embeddings of the classes are the prototypes."""

    def encode(self, class_ids: Tensor, *, exact_rows: bool = False) -> Tensor:  # noqa: D102
        return self.prototypes.index_select(0, class_ids)

    def kept_embeddings(self) -> Tensor:  # noqa: D102
        return self.prototypes

    def step_tensors(self) -> list[Tensor | None]:  # noqa: D102
        return [self.prototypes]

    def reads_folder(self) -> bool:  # noqa: D102
        return False

    def check_contents(self) -> None:
        """Compare nothing: prototypes stay."""


def in_same_dtype(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a move or conversion to a tensor that keeps its dtype."""
    moved = fn(x)
    return moved if moved.dtype == x.dtype else x.to(moved.device)
