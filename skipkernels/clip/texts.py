"""Embedding of the classes: features at the cut of their prompts, computed once, and the text tower above the cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..boundary import LSkipBoundary
from ..features.table import FeatureTable
from ..towers import TextTower, evaluating
from ..towers.prompts import Prompts
from ..towers.watch import Watched

_BYTES_ON_GPU = 256 << 20  # of a folder that a GPU holds in memory: about 40,000 classes of ViT-B


class ClassTexts:
    """Texts of C classes.

    With T templates a class has T prompts. These are T groups of rows in one table, each with the prefix that its
    prompts share. The embedding of a class is the unit-norm mean of the unit-norm embeddings of its prompts.

    Args:
        tower: Text tower, cut.
        tokens: [C, L] or [C, T, L], on the device of the tower.
        chunk: Prompts that run below the cut at a time.
        folder: Folder of the features and prototypes; by default they are in memory.

    Attributes:
        prototypes: [C, D] unit-norm embeddings from before tuning, at least fp32; set by `compute_prototypes`.
    """

    prototypes: Tensor

    def __init__(self, tower: TextTower, tokens: Tensor, chunk: int, folder: str | Path | None = None):
        self.tower, self.chunk = tower, chunk
        self.folder = None if folder is None else Path(folder).absolute()  # of the working directory of now
        if self.folder is not None and tower.skip == 0:
            raise ValueError("SkipCLIP: text_cache keeps features at the cut, and with skip_layers=0 there is no cut.")
        self.groups = _groups(tower, tokens)
        # Features at the cut [R, W] of all prompts, one group after the other; None before they are computed
        self._table: FeatureTable | None = None
        self._watched: Watched | None = None  # what computed them
        # First row of each group
        self._starts = [0, *itertools.accumulate(prompts.row_count for prompts in self.groups[:-1])]
        # Embeddings of all classes; the autocast dtype, and what is above the cut, that computed them
        self._all: tuple[Tensor, torch.dtype | None, Watched] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_table": None, "_all": None}  # not shared with other processes or copies

    def __len__(self) -> int:
        return len(self.groups[0].tokens)

    @property
    def device(self) -> torch.device:
        """Device of the prompts and of the tower above the cut."""
        return self.groups[0].tokens.device

    # ---- encoding ----------------------------------------------------------------------------------------------------

    def encode(self, class_ids: Tensor, *, exact: bool = False) -> Tensor:
        """Class ids [K] to text embeddings [K, D], with gradient. For `exact` see `Prompts.select`."""
        self.tower.runs = len(self.groups)  # for `memory="auto"`
        with parametrize.cached():  # low-rank updates once, not for each group
            embeddings = [self.encode_group(number, class_ids, exact=exact) for number in range(len(self.groups))]
        if len(embeddings) == 1:
            return embeddings[0]
        return torch.stack([unit_norm(x) for x in embeddings]).mean(0).to(embeddings[0].dtype)

    def encode_group(self, number: int, class_ids: Tensor, *, exact: bool = False, cached: bool = True) -> Tensor:
        """Class ids [K] to the embeddings [K, D] of their prompts of one template, any norm."""
        selected = self.groups[number].select(class_ids, exact=exact)
        if cached and self.tower.skip > 0:
            start = self._starts[number]
            rows = self.features().rows(selected.row_numbers + start if start else selected.row_numbers)  # [R, W]
        else:
            rows = selected.pack(self.lower(self.groups[number], class_ids))
        return self.tower.upper(rows, selected)

    def all(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes in evaluation mode, without gradient; kept until a change."""
        device = self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.compare()
        if self._all is not None:
            embeddings, its_autocast, above = self._all
            if autocast == its_autocast and above.keeps_track() and not above.compare():
                return embeddings
        with torch.inference_mode(False), evaluating([self.tower.model]):
            embeddings = self.unit_embeddings(self._class_ids)
        self._all = embeddings, autocast, Watched(self.tower.upper_parts)
        return embeddings

    def of(self, tokens: Tensor) -> Tensor:
        """Unit-norm embeddings [n, D] of other prompts [n, L] or [n, T, L] in evaluation mode; not kept."""
        with evaluating([self.tower.model]):
            texts = self.with_prompts(tokens)
            return texts.unit_embeddings(texts._class_ids, cached=False)

    def encode_prompts(self, tokens: Tensor) -> Tensor:
        """Encode other prompts [n, L], with gradient, cropped to the longest; on a GPU with host syncs."""
        texts = self.with_prompts(tokens)
        return texts.encode_group(0, torch.arange(len(tokens), device=self.device), exact=True, cached=False)

    def compute_prototypes(self) -> None:
        """Set `prototypes`, with the current weights, or from the folder."""
        with evaluating([self.tower.model]):
            if self.folder is None:
                self.prototypes = self.unit_embeddings(self._class_ids)
            else:
                from .text_cache import prototypes_in_folder

                self.prototypes = prototypes_in_folder(self.folder / "prototypes", self)

    def with_prompts(self, tokens: Tensor) -> ClassTexts:
        """Return the texts of other classes, by the same tower."""
        return type(self)(self.tower, tokens.to(self.device, torch.int64), self.chunk)

    def unit_embeddings(self, class_ids: Tensor, *, cached: bool = True) -> Tensor:
        """Unit-norm embeddings [n, D] of classes, at least fp32, without gradient, in chunks."""
        with parametrize.cached(), torch.no_grad():  # low-rank updates once, not for each chunk
            groups = [
                torch.cat([self.encode_group(number, ids, cached=cached) for ids in class_ids.split(self.chunk)])
                for number in range(len(self.groups))
            ]
        return _mean_of_units([unit_norm(x) for x in groups])

    @property
    def _class_ids(self) -> Tensor:
        return torch.arange(len(self), device=self.device)

    # ---- features at the cut -----------------------------------------------------------------------------------------

    def features(self) -> FeatureTable:
        """Features at the cut [R, W] of all prompts; computed again if weights below it changed."""
        if self._table is None or self.is_stale():
            self._all = None
            with torch.inference_mode(False), torch.enable_grad():  # used beyond the caller's context
                self._table = self._compute_table() if self.folder is None else self._open_table()
            self._watched = Watched(self.tower.lower_parts)
        return self._table

    def _compute_table(self) -> FeatureTable:
        features: Tensor | None = None
        for first, rows, _ in self.chunks():
            if features is None:
                features = rows.new_empty(self.row_count, rows.shape[1])
            features[first : first + len(rows)] = rows
        assert features is not None
        return FeatureTable(features)

    def _open_table(self) -> FeatureTable:
        """Open the features in the folder; a small table is read into the memory of a GPU, so that no step waits."""
        from .text_cache import features_in_folder

        assert self.folder is not None
        table = features_in_folder(self.folder / "features", self)
        if self.device.type == "cpu" or len(table) * table.layout.row_bytes > _BYTES_ON_GPU:
            return table
        return FeatureTable(table.rows(torch.arange(len(table), device=self.device)))

    def step_tensors(self) -> list[Tensor | None]:
        """Tensors that a step reads, besides those of the model; None in place of features in a folder."""
        layouts = [x for prompts in self.groups for x in prompts.tensors().values()]
        features = [self.features().features] if self.tower.skip > 0 else []
        return [self.prototypes, *layouts, *features]

    def reads_folder(self) -> bool:
        """Return True if each step reads the features of its classes from the folder, which on a GPU is a host sync."""
        return self.folder is not None and self.features().folder is not None

    @property
    def row_count(self) -> int:
        """R, the number of rows of all prompts."""
        return sum(prompts.row_count for prompts in self.groups)

    def chunks(self, missing: Any = None) -> Iterator[tuple[int, Tensor, int]]:
        """Yield (first row, rows [n, W], number of prompts) of each chunk, or of those with `missing` rows, bool [R].

        Packed by chunks: hidden states [C, L, W] of whole prompts would take several times as much memory.
        """
        for group_start, prompts in zip(self._starts, self.groups, strict=True):
            first, ends = group_start, (group_start + prompts.starts + prompts.lengths).tolist()
            for class_ids in self._class_ids.split(self.chunk):
                end = ends[int(class_ids[-1])]  # the row behind the last suffix
                if missing is None or missing[first:end].any():
                    packed = prompts.pack(self.lower(prompts, class_ids), class_ids)
                    yield first, packed[0 if first == group_start else prompts.prefix_length :], len(class_ids)
                first = end

    def lower(self, prompts: Prompts, class_ids: Tensor) -> Tensor:
        """Hidden states [n, L, W] of prompts at the cut."""
        tokens = prompts.tokens[class_ids]
        if self.tower.skip == 0:
            return self.tower.lower(tokens, prompts)

        def lower(tokens: Tensor) -> Tensor:
            return self.tower.lower(tokens, prompts)

        with torch.autocast(self.device.type, enabled=False):
            tokens = tokens.to(self.tower.lower_device or self.device)
            return LSkipBoundary.apply(lower, tokens, self.chunk).to(self.device)

    # ---- changes -----------------------------------------------------------------------------------------------------

    def compare(self) -> None:
        """Compare contents and settings below the cut, and drop the features if they differ."""
        if self._watched is not None and self._watched.compare():
            self.drop()

    def is_stale(self) -> bool:
        """Return True if the features were computed with other weights."""
        return self._watched is not None and self._watched.is_stale()

    def drop(self) -> None:
        """Drop the features and embeddings that are kept."""
        self._table = self._all = None

    def apply(self, fn: Callable[[Tensor], Tensor], *, keep: bool) -> None:
        """Move or convert the tensors that belong to no module; features if `keep` and their dtype stays."""
        features = self._table.features if keep and self._table is not None else None  # None of a folder
        self.drop()
        for prompts in self.groups:
            prompts.apply(fn)
        moved = fn(self.prototypes)  # stay at least fp32
        self.prototypes = moved if moved.dtype == self.prototypes.dtype else self.prototypes.to(moved.device)
        if features is not None and (moved := fn(features)).dtype == features.dtype:
            self._table = FeatureTable(moved)
        if keep and self._watched is not None:
            self._watched = Watched(self.tower.lower_parts)  # digests of another dtype differ


class FixedTexts(ClassTexts):
    """Texts that do not train: the embeddings of the classes are the prototypes."""

    def encode(self, class_ids: Tensor, *, exact: bool = False) -> Tensor:  # noqa: D102
        return self.prototypes.index_select(0, class_ids)

    def all(self) -> Tensor:  # noqa: D102
        return self.prototypes

    def step_tensors(self) -> list[Tensor | None]:  # noqa: D102
        return [self.prototypes]


def _groups(tower: TextTower, tokens: Tensor) -> list[Prompts]:
    """Prompts of each template, of tokens [C, L] or [C, T, L]."""
    return [tower.read_prompts(x.contiguous()) for x in (tokens.unbind(1) if tokens.ndim == 3 else [tokens])]


def _mean_of_units(embeddings: Sequence[Tensor]) -> Tensor:
    """Unit-norm mean [n, D] of the unit-norm embeddings [n, D] of each group."""
    return embeddings[0] if len(embeddings) == 1 else unit_norm(torch.stack(list(embeddings)).mean(0))


def unit_norm(embeddings: Tensor) -> Tensor:
    """Unit-norm rows, at least fp32."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    return nn.functional.normalize(embeddings.to(wide), dim=-1)
