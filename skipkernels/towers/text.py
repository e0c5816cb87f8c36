"""Text towers: from prompts, or from their rows at the cut, to text embeddings."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..dtypes import without_autocast
from .base import Tower, present
from .prompts import Pooling, Prompts, SelectedPrompts
from .rows import SingleQuery, Suffixes


class TextTower(Tower):
    """A tower over prompts. The embedding of a prompt is computed from its pooled token.

    Above the cut, if its blocks take rows and the prompts share a prefix, the rows are those of the prefix, once, then
    those of the suffix of each class.
    """

    def read_prompts(self, tokens: Tensor) -> Prompts:
        """Lay out the rows of prompts [C, L], by every reduction that is exact for them."""
        return Prompts(tokens, self.pooling(tokens))

    def lower(self, selected: SelectedPrompts) -> Tensor:
        """Map prompts to rows [R, W] at the cut; with a cut constants, which do not depend on autocast."""
        prompts, tokens = selected.prompts, selected.tokens
        with without_autocast(tokens.device) if self.skip > 0 else contextlib.nullcontext():
            hidden = self._run_lower(lambda chunk: (self.embed(chunk, prompts), self.mask(chunk, prompts)), tokens)
            return selected.pack(hidden)

    def upper(self, rows: Iterable[Tensor], selected: Iterable[SelectedPrompts]) -> list[Tensor]:
        """Map rows [R, W] at the cut of the prompts of each template to text embeddings [K, D], not normalised."""
        templates = zip(rows, selected, strict=True)
        if not self.takes_rows_above:
            return [self.upper_by_calls(*of_template) for of_template in templates]
        # Low-rank updates once, not for each template; not those of blocks that backward may call again
        with parametrize.cached():
            return [self.finish(self._upper_by_rows(*of_template)) for of_template in templates]

    def upper_by_calls(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Map rows [R, W] to embeddings [K, D] by blocks that are called as the model calls them."""
        mask = self.mask(selected.tokens, selected.prompts)
        hidden = self._call_upper_blocks(selected.unpack(rows), mask)  # [K, L, W]
        return self.finish(hidden[torch.arange(len(hidden), device=hidden.device), selected.pooled])

    def _upper_by_rows(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Map rows [R, W] to hidden states [K, W] of the pooled tokens, by blocks that take rows."""
        prompts = selected.prompts
        if prompts.prefix_length > 0:
            attention = Suffixes(
                backend=self.cut.backend,
                prefix_length=prompts.prefix_length,
                offsets=selected.offsets,
                max_length=prompts.max_suffix_length,
                last_rows=selected.last_rows,
            )
            return self._run_upper_rows(rows, attention, replace(attention, only_last=True))
        features, mask = selected.unpack(rows), self.mask(selected.tokens, prompts)
        K, L, _ = features.shape
        class_numbers, positions = torch.arange(K, device=features.device), selected.pooled  # [K] each
        # Rows of the mask at the pooled tokens: [1 or K, 1, L, L] -> [K, L]
        pooled_mask = None if mask is None else mask.expand(K, 1, L, L)[class_numbers, 0, positions]
        last_attention = SingleQuery(class_numbers * L + positions, pooled_mask)
        return self._run_upper_rows(features.flatten(0, 1), self._sequences(features, mask), last_attention)

    @abstractmethod
    def pooling(self, tokens: Tensor) -> Pooling:
        """Find the pooled token of each prompt [C, L], and which reductions are not exact for them."""

    @abstractmethod
    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        """Map tokens [n, L] of some of these prompts to the hidden states in front of the first block."""

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        """Causal mask, added to the logits, [1 or n, 1, L, L]; families may override it."""
        length = tokens.shape[1]
        return torch.full((1, 1, length, length), -torch.inf, device=tokens.device).triu(1)

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Map hidden states [K, W] of the pooled tokens behind the last block to embeddings [K, D]."""

    def masks(self) -> list[Tensor | None]:
        """Masks of the model that determined the layout of the prompts."""
        return []

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids of the embedding; None if it has no `nn.Embedding`."""
        parts = (part for part in present(self.embedding) if isinstance(part, nn.Module))
        modules = (module for part in parts for module in part.modules())
        return next((module.num_embeddings for module in modules if isinstance(module, nn.Embedding)), None)

    def reference_forward(self, inputs: Tensor) -> Tensor:
        return self.model.encode_text(inputs)
