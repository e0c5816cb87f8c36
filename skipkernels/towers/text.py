"""Text towers: map prompts, or their rows at the cut, to text embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from . import attention
from .base import PooledTokens, Reduction, Tower
from .block import global_hooks
from .fused.records import Hidden, RowsCall
from .modes import is_deterministic
from .prompts import Pooling, Prompts, SelectedPrompts


class TextTower(Tower):
    """A tower over prompts. The embedding of a prompt is computed from its pooled token.

    Above the cut, tokens are rows: the prefix that all prompts share, once, then the suffix of each class.
    """

    @abstractmethod
    def pooling(self, tokens: Tensor) -> Pooling:
        """Find the pooled token of each prompt [C, L], and which reductions are not exact for them."""

    def read_prompts(self, tokens: Tensor, templates: int = 1) -> Prompts:
        """Lay out the rows of prompts [C, L] of one of some templates, by every reduction that is exact for them."""
        return Prompts(tokens, self.pooling(tokens), templates)

    def reductions(self, prompts: Prompts) -> dict[str, Reduction]:
        """The exact reductions of this tower over some prompts by name, as they are now."""
        depth = len(self.blocks)
        reasons = {
            "text_crop": prompts.not_cropped,
            "shared_prefix": prompts.not_shared or self._why_not_shared(self._blocks_without_rows(0), depth),
            "fused_block": self.why_not_all_rows(),
            "pooled_last_block": self.why_no_rows(depth - 1),
        }
        return {name: Reduction.unless(reason) for name, reason in reasons.items()}

    def _blocks_without_rows(self, start: int) -> dict[int, str]:
        """Blocks from `start` on that take whole prompts only, with the reason."""
        return {i: why for i in range(start, len(self.blocks)) if (why := self.why_no_rows(i)) is not None}

    def _why_not_shared(self, without_rows: Mapping[int, str], count: int) -> str | None:
        """Return why `count` blocks, of which some take no rows, don't run the shared prefix once, or None."""
        if not without_rows:
            return None
        reason = next(iter(without_rows.values()))
        if len(without_rows) == count:  # no block would run it once
            return reason
        if global_hooks():  # they would see whole prompts in some blocks, and rows in others
            return reason
        for index in without_rows:
            block = self.blocks[index]
            if not is_deterministic(block):
                return f"block {index}, which is not fused, has dropout or a batch norm"
            if any(module._backward_hooks or module._backward_pre_hooks for module in block.modules()):
                return f"block {index} has backward hooks"
        return None

    def masks(self) -> list[Tensor | None]:
        """Masks of the model that determined the layout of the prompts."""
        return []

    def reference_forward(self, inputs: Tensor) -> Tensor:
        return self.model.encode_text(inputs)

    @abstractmethod
    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        """Map tokens [n, L] of some of these prompts to the hidden states in front of the first block."""

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        """Causal mask, added to the logits, [1 or n, 1, L, L]; families may override it."""
        length = tokens.shape[1]
        return torch.full((1, 1, length, length), -torch.inf, device=tokens.device).triu(1)

    def lower(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        """Map tokens [n, L] of some of these prompts to hidden states at the cut [n, L, W], in evaluation mode."""
        with self._evaluating_lower():
            return self._run_lower(self.embed(tokens, prompts), self.mask(tokens, prompts))

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Map hidden states [K, W] of the pooled tokens behind the last block to embeddings [K, D]."""

    def upper(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Map rows [R, W] of some prompts at the cut to text embeddings [K, D], not normalised."""
        without_rows = self._blocks_without_rows(self.skip)
        if selected.prompts.prefix_length and self._why_not_shared(without_rows, len(self.blocks) - self.skip) is None:
            return self.finish(self._run_suffixes(rows, selected, without_rows))
        return self.finish(self._run_whole_prompts(rows, selected, without_rows))

    def _run_whole_prompts(self, rows: Tensor, selected: SelectedPrompts, without_rows: Mapping[int, str]) -> Tensor:
        """Run every block over whole prompts; return hidden states [K, W] of the pooled tokens."""
        features = selected.unpack(rows)  # [K, L, W]
        mask, runs = self.mask(selected.tokens, selected.prompts), selected.prompts.templates
        (K, L, _), depth = features.shape, len(self.blocks)
        class_numbers, positions = torch.arange(K, device=rows.device), selected.pooled  # [K] each
        if self.skip == depth or depth - 1 in without_rows:
            return self._run_upper(features, mask, runs)[class_numbers, positions]
        # Rows of the mask at the pooled tokens: [1 or K, 1, L, L] -> [K, L]
        pooled_mask = None if mask is None else mask.expand(K, 1, L, L)[class_numbers, 0, positions]
        return self._run_upper_pooled(features, mask, PooledTokens(class_numbers * L + positions, pooled_mask), runs)

    def _run_suffixes(self, rows: Tensor, selected: SelectedPrompts, without_rows: Mapping[int, str]) -> Tensor:
        """Run every block over the shared prefix and the suffixes; return hidden states [K, W] of the pooled tokens."""
        prompts, last_rows, depth = selected.prompts, selected.last_rows, len(self.blocks)
        attend = partial(
            attention.suffixes,
            backend=self.backend,
            prefix_length=prompts.prefix_length,
            offsets=selected.offsets,
            max_length=prompts.max_suffix_length,
            rows_without_self=last_rows if prompts.excludes_self else None,
        )
        how = RowsCall(attend, self.block_memory(rows, prompts.templates))
        hidden = Hidden(rows)
        for index in range(self.skip, depth):
            if index in without_rows:
                hidden = self._run_whole(index, hidden, selected)
            elif index < depth - 1:
                hidden = self.blocks[index](hidden, how)
            else:  # returns the pooled tokens, a selection: one kernel computes all suffixes behind the prefix
                how = how._replace(attend=partial(attend, query_rows=last_rows), query_rows=last_rows)
                return self.blocks[index](hidden, how).sum()
        return hidden.sum()[last_rows]

    def _run_whole(self, index: int, hidden: Hidden, selected: SelectedPrompts) -> Hidden:
        """Run a block that takes no rows over whole prompts, unpacked from rows and packed again."""
        mask = self.mask(selected.tokens, selected.prompts)
        return Hidden(selected.pack(self._run_own_forward(index, selected.unpack(hidden.sum()), mask)))


def representative_classes(prompts: Prompts) -> Tensor:
    """Class ids [K] of the first and the last class, and of those with the shortest and the longest prompt."""
    ends = prompts.pooled
    return torch.unique(torch.stack([ends.new_zeros(()), ends.argmin(), ends.argmax(), ends.new_tensor(len(ends) - 1)]))
