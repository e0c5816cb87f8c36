"""Text towers: map prompts, or their rows at the cut, to text embeddings."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import attention
from .base import Tower
from .eligibility import global_hooks
from .fused_block import Hidden
from .modes import is_deterministic
from .prompts import PackedPrompts, SelectedPrompts, shared_prefix_length
from .reductions import Reduction


class TextTower(Tower):
    """A tower over the prompts of the task's classes. The embedding of a prompt is computed from its pooled token.

    Above the cut, tokens are rows: the prefix that all prompts share, once, then the suffix of each class.
    """

    prompts: PackedPrompts  # Tokens of the prompts, cropped where that is exact, and the layout of their rows

    @abstractmethod
    def read_prompts(self, tokens: Tensor) -> None:
        """Set the prompts, int64 [C, L]: find the pooled tokens, and call `_set_prompts`."""

    def with_prompts(self, tokens: Tensor) -> TextTower:
        """Return a tower over other prompts, int64 [C, L], with the same modules, cut and settings."""
        tower = copy.copy(self)
        tower.read_prompts(tokens)
        return tower

    def _set_prompts(
        self,
        tokens: Tensor,
        pooled: Tensor,
        not_fused: str | None,
        last_not_fused: str | None,
        *,
        not_causal: str | None = None,
        not_cropped: str | None = None,
        visible_length: int | None = None,
        excludes_self: bool = False,
    ) -> None:
        """Set the prompts, and apply every reduction that is exact; the arguments `…not_…` are reasons why one is not.

        `visible_length` is the number of tokens that a pooled token can see; by default up to the last pooled token.
        """
        tokens = tokens if not_cropped else tokens[:, : visible_length or int(pooled.max()) + 1].contiguous()
        length = shared_prefix_length(tokens, pooled, excludes_self=excludes_self)
        not_shared = (
            not_causal
            or (not_fused if not any(map(self.is_fused, range(len(self.blocks)))) else self._why_prompts_differ())
            or (None if length else "the prompts begin with different tokens")
        )
        self.prompts = PackedPrompts(tokens, pooled, 0 if not_shared else length, excludes_self=excludes_self)
        reasons = {
            "text_crop": not_cropped,
            "shared_prefix": not_shared,
            "fused_block": not_fused,
            "pooled_last_block": last_not_fused,
        }
        self.reductions = {name: Reduction.unless(reason) for name, reason in reasons.items()}

    def _why_prompts_differ(self) -> str | None:
        """Return why the prefix is not computed once in a block that is not fused, or None."""
        for index, block in enumerate(self.blocks):
            if self.is_fused(index):
                continue
            if not is_deterministic(block):
                return f"block {index}, which is not fused, has dropout or a batch norm"
            if any(module._backward_hooks or module._backward_pre_hooks for module in block.modules()):
                return f"block {index} has backward hooks"
        return None

    @property
    def tokens(self) -> Tensor:
        """Prompts of all classes, int64 [C, L]."""
        return self.prompts.tokens

    @property
    def pooled(self) -> Tensor:
        """Positions of the pooled tokens, int64 [C]."""
        return self.prompts.pooled

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the tensors that are not in the model."""
        self.prompts.apply(fn)

    def summary(self) -> dict[str, Any]:  # noqa: D102
        return super().summary() | {
            "the tokens that are seen": self.tokens.tolist(),
            "the positions that become embeddings": self.pooled.tolist(),
        }

    def reference_forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.model.encode_text(inputs)

    def mask(self, inputs: Tensor) -> Tensor | None:
        """Causal mask; families may override it."""
        length = inputs.shape[1]
        return torch.full((1, 1, length, length), -torch.inf, device=inputs.device).triu(1)

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Map hidden states [K, W] of the pooled tokens behind the last block to embeddings [K, D]."""

    def upper(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Map rows [R, W] of some prompts at the cut to text embeddings [K, D], not normalised."""
        shares = self.prompts.prefix_length and not global_hooks()
        run = self._run_suffixes if shares else self._run_whole_prompts
        return self.finish(run(rows, selected))

    def _run_whole_prompts(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Run every block over whole prompts; return hidden states [K, W] of the pooled tokens."""
        features = selected.unpack(rows)  # [K, L, W]
        mask = self.mask(self.tokens[selected.class_ids])
        depth, save_inputs_only = len(self.blocks), self.saves_inputs_only(features)
        pools = self.skip < depth and self.current_reductions()["pooled_last_block"].enabled
        hidden = Hidden(features)
        for index in range(self.skip, depth - pools):
            hidden = self._run_upper_block(index, hidden, mask, save_inputs_only=save_inputs_only)
        if not pools:
            return selected.pack(hidden.sum())[selected.ends]
        if mask is not None:
            n, length, _ = features.shape
            positions = self.pooled[selected.class_ids]
            # The row of the mask at each pooled token: [1 or K, 1, L, L] -> [K, L]
            mask = mask.expand(n, 1, length, length)[torch.arange(n, device=rows.device), 0, positions]
        attention_fn = partial(attention.pooled, mask=mask)
        pooled = self._run_fused_block(
            depth - 1,
            hidden.map(lambda x: x.flatten(0, 1)),
            attention_fn,
            save_inputs_only=save_inputs_only,
            query_rows=selected.ends,
            separate_queries=True,
        )
        return pooled.sum()

    def _run_suffixes(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Run every block over the shared prefix and the suffixes; return hidden states [K, W] of the pooled tokens."""
        depth, save_inputs_only = len(self.blocks), self.saves_inputs_only(rows)
        if self.skip == depth:
            return rows[selected.ends]
        attention_fn = partial(
            attention.suffixes,
            backend=self.attention_backend,
            prefix_length=self.prompts.prefix_length,
            offsets=selected.offsets,
            max_length=self.prompts.max_length,
            excludes_self=selected.ends if self.prompts.excludes_self else None,
        )
        hidden, options = Hidden(rows), {"save_inputs_only": save_inputs_only}
        pools = self.is_fused(depth - 1)
        for index in range(self.skip, depth - pools):
            if self.is_fused(index):
                hidden = self._run_fused_block(index, hidden, attention_fn, **options)
            else:
                hidden = self._run_on_whole_prompts(index, hidden, selected)
        if not pools:
            return hidden.sum()[selected.ends]
        last = partial(attention_fn, rows=selected.ends)
        return self._run_fused_block(depth - 1, hidden, last, query_rows=selected.ends, **options).sum()

    def _run_on_whole_prompts(self, index: int, hidden: Hidden, selected: SelectedPrompts) -> Hidden:
        """Run a block that is not fused over whole prompts, unpacked from rows and packed again."""
        whole, mask = Hidden(selected.unpack(hidden.sum())), self.mask(self.tokens[selected.class_ids])
        return self._run_upper_block(index, whole, mask, save_inputs_only=False).map(selected.pack)
