"""Embedding of prompts by the text tower. For the classes of a task, features at the cut are computed once and kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from .. import functional
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


class PromptEncoder:
    """The text tower over the prompts of n classes; keeps nothing that it computes.

    With T templates a class has T prompts. The prompts of a template are a group, with the prefix that they share. The
    embedding of a class is the mean of the unit-norm embeddings of its prompts.

    Args:
        tower: Text tower, cut.
        tokens: [n, L] or [n, T, L].

    Attributes:
        templates: The prompts of each template.
    """

    def __init__(self, tower: TextTower, tokens: Tensor):
        self.tower, self.tokens = tower, tokens
        on_device = tokens.to(tower.model.logit_scale.device, torch.int64)
        of_templates = on_device.unbind(1) if tokens.ndim == 3 else [on_device]
        self.templates = [tower.read_prompts(x.contiguous()) for x in of_templates]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        """Device of the prompts and of the tower above the cut."""
        return self.templates[0].tokens.device

    @property
    def class_ids(self) -> Tensor:
        """Ids [n] of all classes."""
        return torch.arange(len(self), device=self.device)

    def encode(self, class_ids: Tensor, *, exact_rows: bool = False) -> Tensor:
        """Class ids [K] to text embeddings [K, D], any norm, with gradient; for `exact_rows` see `Prompts.select`."""
        embeddings = self.encode_templates(class_ids, exact_rows=exact_rows)
        if len(embeddings) == 1:
            return embeddings[0]
        return torch.stack([unit_norm(x) for x in embeddings]).mean(0).to(embeddings[0].dtype)

    def encode_templates(
        self, class_ids: Tensor, numbers: Sequence[int] | None = None, *, exact_rows: bool = False
    ) -> list[Tensor]:
        """Class ids [K] to the embeddings [K, D] of their prompts of each template, or of those with these numbers."""
        numbers = range(len(self.templates)) if numbers is None else numbers
        selected = {t: self.templates[t].select(class_ids, exact_rows=exact_rows) for t in numbers}
        return self.tower.upper(self.features(selected), selected.values())

    def embeddings(self, class_ids: Tensor | None = None) -> Tensor:
        """Unit-norm embeddings [K, D], by default of all, in evaluation mode, without gradient, at least fp32."""
        class_ids = self.class_ids if class_ids is None else class_ids
        with evaluating([self.tower.model]), torch.no_grad(), parametrize.cached():
            chunks = [self.encode_templates(ids) for ids in class_ids.split(self.tower.cut.chunk)]
            of_templates = [unit_norm(torch.cat(parts)) for parts in zip(*chunks, strict=True)]  # T × [K, D]
            return of_templates[0] if len(of_templates) == 1 else unit_norm(torch.stack(of_templates).mean(0))

    def features(self, selected: Mapping[int, SelectedPrompts]) -> list[Tensor]:
        """Features [R, W] at the cut of some prompts of each template, by its number."""
        return [self.compute_features(of_template) for of_template in selected.values()]

    def compute_features(self, selected: SelectedPrompts) -> Tensor:
        """Compute the features [R, W] of some prompts at the cut."""
        # Below a cut as kept features are: without autocast.
        autocast = torch.autocast(self.device.type, enabled=False) if self.tower.skip > 0 else nullcontext()
        with autocast:
            return selected.pack(self.tower.lower(selected.tokens, selected.prompts))


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


class ClassTexts(PromptEncoder):
    """Texts of the C classes of a task.

        embeddings of      gradient   norm   kept
        encode             yes        any    no
        embeddings         no         1      no
        kept_embeddings    no         1      until a change of weights, settings or autocast
        prototypes         no         1      always

    `features` at the cut are rows of `table`, which is computed again after a change of weights below the cut.

    Args:
        tower: Text tower, cut.
        tokens: [C, L] or [C, T, L].
        folder: Folder of the features; by default they are in memory.
        prototypes: [C, D]; by default computed with the current weights.

    Attributes:
        prototypes: [C, D] unit-norm embeddings from before tuning, at least fp32.
        watched: Modules and weights that computed the features; None before.
    """

    def __init__(self, tower: TextTower, tokens: Tensor, folder: Path | None = None, prototypes: Tensor | None = None):
        super().__init__(tower, tokens)
        if folder is not None and tower.skip == 0:
            raise ValueError("SkipCLIP: text_cache keeps features at the cut, and with skip_layers=0 there is no cut.")
        self.folder = folder
        # Features at the cut [R, W] of all prompts, one template after the other; None before they are computed
        self._table: FeatureTable | None = None
        self.watched: Watched | None = None
        # First row of each template
        self._starts = [0, *itertools.accumulate(prompts.row_count for prompts in self.templates[:-1])]
        self._kept: _Kept | None = None
        self.prototypes = self.embeddings() if prototypes is None else prototypes

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_table": None, "_kept": None}  # not shared with other processes or copies

    @torch.no_grad()
    def scores(self, image: Tensor, labels: Tensor | None) -> Tensor:
        """Highest cosine [C] of each prototype with an image [B, D], +∞ for classes of labels [B] or [B, C], if any."""
        prototypes = self.prototypes
        with torch.autocast(image.device.type, enabled=False):  # autocast would cast all prototypes in each step
            image = image.to(prototypes.dtype)
            if labels is None or labels.ndim == 1:
                return functional.class_scores(image, prototypes, labels)
            return functional.class_scores(image, prototypes).masked_fill((labels != 0).any(dim=0), torch.inf)

    def kept_embeddings(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes in evaluation mode, without gradient; kept until a change."""
        autocast = autocast_dtype(self.device)
        self.check_contents()
        if self._kept is not None and self._kept.is_valid(autocast):
            return self._kept.embeddings
        with torch.inference_mode(False):
            embeddings = self.embeddings()
        self._kept = _Kept(embeddings, autocast, Watched(self.tower.upper_parts))
        return embeddings

    def others(self, tokens: Tensor) -> PromptEncoder:
        """Return an encoder of other prompts [n, L] or [n, T, L], by the same tower."""
        return PromptEncoder(self.tower, tokens)

    # ---- features at the cut -----------------------------------------------------------------------------------------

    def features(self, selected: Mapping[int, SelectedPrompts]) -> list[Tensor]:
        """Features [R, W] at the cut of some prompts of each template, from the table."""
        if self.tower.skip == 0:  # the embedding trains
            return super().features(selected)
        table = self.table()
        starts = ((self._starts[t], x.row_numbers) for t, x in selected.items())
        return [
            table.rows(row_numbers + start if start else row_numbers).to(self.device) for start, row_numbers in starts
        ]

    def table(self) -> FeatureTable:
        """Features at the cut [R, W] of all prompts; computed again if weights below it changed."""
        if self._table is None or self.is_stale():
            self._kept = None
            with torch.inference_mode(False):  # later steps use them, and these may train
                self._table = self._compute_table() if self.folder is None else self._open_table(self.folder)
            self.watched = Watched(self.tower.lower_parts)
        return self._table

    def _compute_table(self) -> FeatureTable:
        features: Tensor | None = None
        for first, rows, _ in self.lower_chunks():
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
        tables = [self.table()] if self.tower.skip > 0 else []
        features = [table.features if isinstance(table, MemoryTable) else None for table in tables]
        return [self.prototypes, *layouts, *features]

    @property
    def row_count(self) -> int:
        """R, the number of rows of all prompts."""
        return sum(prompts.row_count for prompts in self.templates)

    def lower_chunks(self, missing: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, Tensor, int]]:
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
        self._table = self._kept = self.watched = None

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the tensors that belong to no module by `fn`; features in memory stay if their dtype does."""
        for prompts in self.templates:
            prompts.apply(fn)
        self.prototypes = in_same_dtype(fn, self.prototypes)
        self._kept = None
        table, self._table = self._table, None
        if isinstance(table, MemoryTable) and (features := fn(table.features)).dtype == table.dtype:
            self._table = MemoryTable(features)


class FixedTexts(ClassTexts):
    """Texts that do not train: the embeddings of the classes are the prototypes."""

    def encode(self, class_ids: Tensor, *, exact_rows: bool = False) -> Tensor:  # noqa: D102
        return self.prototypes.index_select(0, class_ids)

    def kept_embeddings(self) -> Tensor:  # noqa: D102
        return self.prototypes

    def step_tensors(self) -> list[Tensor | None]:  # noqa: D102
        return [self.prototypes]


def in_same_dtype(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a move or conversion to a tensor that keeps its dtype."""
    moved = fn(x)
    return moved if moved.dtype == x.dtype else x.to(moved.device)
