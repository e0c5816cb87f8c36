"""Embedding of prompts by the text tower. For the classes of a task, features at the cut are computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from .. import functional
from ..dtypes import autocast_dtype, in_same_dtype, without_autocast
from ..features.table import FeatureTable, MemoryTable
from ..reference import unit_norm
from ..towers.modes import evaluating
from ..towers.watch import Watch
from .text_features import TextFeatures

if TYPE_CHECKING:
    from ..towers.prompts import SelectedPrompts
    from ..towers.text import TextTower


class PromptEncoder:
    """The text tower over the prompts of n classes.

    With T templates a class has T prompts. The prompts of a template are a group, with the prefix that they share. The
    embedding of a class is the mean of the unit-norm embeddings of its prompts.

    Args:
        tower: Text tower, cut.
        tokens: [n, L] or [n, T, L].

    Attributes:
        templates: The prompts of each template.
        features: Features at the cut of all prompts; None if they are computed in each call.
    """

    features: TextFeatures | None = None

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

    def encode(self, class_ids: Tensor) -> Tensor:
        """Different class ids [K] to text embeddings [K, D], any norm, with gradient."""
        embeddings = self.encode_templates(class_ids)
        return mean_of_templates(embeddings).to(embeddings[0].dtype)

    def encode_repeated(self, class_ids: Tensor) -> Tensor:
        """Class ids [K] that may repeat to text embeddings [K, D]; on a GPU with a host sync.

        Each class is encoded once: where a class repeats, dropout above the cut drops the same values.
        """
        different, positions = class_ids.unique(return_inverse=True)
        return self.encode(different)[positions]

    def encode_templates(self, class_ids: Tensor) -> list[Tensor]:
        """Different class ids [K] to the embeddings [K, D] of their prompts of each template, with gradient."""
        selected = [prompts.select(class_ids) for prompts in self.templates]
        return self.tower.upper(self.rows(selected), selected)

    def rows(self, selected: Sequence[SelectedPrompts]) -> list[Tensor]:
        """Features at the cut [R, W] of some prompts of one or more templates: kept, or computed now."""
        if self.features is None:
            return [self.tower.lower(of_template) for of_template in selected]
        return self.features.rows(selected)

    def compute_embeddings(self) -> Tensor:
        """Unit-norm embeddings [n, D] of all classes in evaluation mode, without gradient, at least fp32."""
        with evaluating([self.tower.model]), torch.no_grad(), parametrize.cached():
            chunks = self.class_ids.split(self.tower.cut.chunk)
            return unit_norm(torch.cat([mean_of_templates(self.encode_templates(ids)) for ids in chunks]))


def mean_of_templates(embeddings: Sequence[Tensor]) -> Tensor:
    """Mean of the unit-norm embeddings [K, D] of each template, at least fp32; those of one template as they are."""
    return embeddings[0] if len(embeddings) == 1 else torch.stack([unit_norm(x) for x in embeddings]).mean(0)


class ClassTexts(PromptEncoder):
    """Texts of the C classes of a task.

        embeddings of        gradient   norm   kept
        encode               yes        any    no
        compute_embeddings   no         1      no
        kept_embeddings      no         1      until a change of weights, settings or autocast
        prototypes           no         1      always

    Args:
        tower: Text tower, cut.
        tokens: [C, L] or [C, T, L].
        folder: Folder of the features; by default they are in memory.
        prototypes: [C, D]; by default computed with the current weights.

    Attributes:
        prototypes: [C, D] unit-norm embeddings from before tuning, at least fp32.
    """

    def __init__(self, tower: TextTower, tokens: Tensor, folder: Path | None = None, prototypes: Tensor | None = None):
        super().__init__(tower, tokens)
        if folder is not None and tower.skip == 0:
            raise ValueError("SkipCLIP: text_cache keeps features at the cut, and with skip_layers=0 there is no cut.")
        self.folder = folder
        if tower.skip > 0:
            self.features = TextFeatures(tower, self.templates, folder)
        self._kept: _Kept | None = None
        self.prototypes = self.compute_embeddings() if prototypes is None else prototypes

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": None}  # not shared with other processes or copies

    @torch.no_grad()
    def scores(self, image: Tensor, labels: Tensor | None) -> Tensor:
        """Highest cosine [C] of each prototype with an image [B, D], +∞ for classes of labels [B] or [B, C], if any."""
        prototypes = self.prototypes
        with without_autocast(image.device):  # autocast would cast all prototypes in each step
            image = image.to(prototypes.dtype)
            if labels is None or labels.ndim == 1:
                return functional.class_scores(image, prototypes, labels)
            return functional.class_scores(image, prototypes).masked_fill((labels != 0).any(dim=0), torch.inf)

    @property
    def table(self) -> FeatureTable | None:
        """Features at the cut as they are now, if they are kept."""
        return None if self.features is None else self.features.table()

    def kept_embeddings(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes in evaluation mode, without gradient; kept until a change."""
        self.check_contents()
        if self._kept is None or not self._kept.is_valid(self):
            with torch.inference_mode(False):
                self._kept = _Kept.compute(self)
        return self._kept.embeddings

    def step_tensors(self) -> list[Tensor | None]:
        """Tensors that a step reads, besides those of the model; None in place of features in a folder."""
        layouts = [x for prompts in self.templates for x in prompts.tensors().values()]
        if (table := self.table) is None:
            return [self.prototypes, *layouts]
        return [self.prototypes, *layouts, table.features if isinstance(table, MemoryTable) else None]

    def check_contents(self) -> None:
        """Compare contents and settings below the cut, and drop the features if they differ."""
        if self.features is not None and self.features.below.compare():
            self.features.drop()

    def drop(self) -> None:
        """Drop the features and embeddings that are kept."""
        self._kept = None
        if self.features is not None:
            self.features.drop()

    def convert(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the tensors that belong to no module by `fn`; features in memory stay if their dtype does."""
        for prompts in self.templates:
            prompts.apply(fn)
        self.prototypes = in_same_dtype(fn, self.prototypes)
        self._kept = None
        if self.features is not None:
            self.features.convert(fn)


class FixedTexts(ClassTexts):
    """Texts that do not train: the embeddings of the classes are the prototypes."""

    def encode(self, class_ids: Tensor) -> Tensor:  # noqa: D102
        return self.prototypes.index_select(0, class_ids)

    def kept_embeddings(self) -> Tensor:  # noqa: D102
        return self.prototypes

    def step_tensors(self) -> list[Tensor | None]:  # noqa: D102
        return [self.prototypes]


class _Kept(NamedTuple):
    """Embeddings of all classes, with what they were computed by."""

    embeddings: Tensor  # [C, D]
    autocast: torch.dtype | None
    table: FeatureTable | None  # features at the cut, if they are kept
    above: Watch  # of modules and weights above the cut

    @classmethod
    def compute(cls, texts: ClassTexts) -> _Kept:
        """Compute the embeddings, and begin to watch what is above the cut."""
        above = Watch(texts.tower.upper_parts)
        kept = cls(texts.compute_embeddings(), autocast_dtype(texts.device), texts.table, above)
        above.start()
        return kept

    def is_valid(self, texts: ClassTexts) -> bool:
        """Return True if an evaluation would compute the same embeddings, by contents and settings above the cut.

        Contents, since a write through `.data` changes no version. A step compares versions alone, see
        `TextFeatures.table`: it should not read all weights.
        """
        if self.autocast != autocast_dtype(texts.device) or self.table is not texts.table:
            return False
        return self.above.is_comparable() and not self.above.compare()
