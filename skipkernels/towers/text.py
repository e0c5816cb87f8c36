"""Text towers: map prompts, or their rows at the cut, to text embeddings."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container
from functools import partial

import torch
from torch import Tensor

from . import attention
from .base import Reduction, Tower, is_deterministic
from .block import RowsCall, global_hooks
from .fused import Hidden
from .prompts import Prompts, SelectedPrompts, shared_prefix_length


class TextTower(Tower):
    """A tower over prompts. The embedding of a prompt is computed from its pooled token.

    Above the cut, tokens are rows: the prefix that all prompts share, once, then the suffix of each class.
    """

    @abstractmethod
    def read_prompts(self, tokens: Tensor) -> Prompts:
        """Find the pooled token of each prompt, int64 [C, L], and the layout of their rows, by `_layout`."""

    def _layout(
        self,
        tokens: Tensor,
        pooled: Tensor,
        *,
        not_causal: str | None = None,
        not_cropped: str | None = None,
        visible_length: int | None = None,
        excludes_self: bool = False,
    ) -> Prompts:
        """Apply every reduction that is exact for these prompts; `not_…` are reasons why one is not.

        `visible_length` is the number of tokens that a pooled token can see; by default up to the last pooled token.
        """
        given_length = tokens.shape[1]
        tokens = tokens if not_cropped else tokens[:, : visible_length or int(pooled.max()) + 1].contiguous()
        length = shared_prefix_length(tokens, pooled, excludes_self=excludes_self)
        not_shared = not_causal or (None if length else "the prompts begin with different tokens")
        return Prompts(
            tokens,
            pooled,
            0 if not_shared else length,
            excludes_self=excludes_self,
            given_length=given_length,
            not_cropped=not_cropped,
            not_shared=not_shared,
        )

    def reductions(self, prompts: Prompts) -> dict[str, Reduction]:
        """The exact reductions of this tower over some prompts by name, as they are now."""
        reasons = {
            "text_crop": prompts.not_cropped,
            "shared_prefix": prompts.not_shared or self._why_not_shared(self._whole_blocks(0), len(self.blocks)),
            "fused_block": self.why_not_fused(),
            "pooled_last_block": self.why_no_rows(len(self.blocks) - 1),
        }
        return {name: Reduction.unless(reason) for name, reason in reasons.items()}

    def _whole_blocks(self, start: int) -> dict[int, str]:
        """Blocks from `start` on that take whole prompts only, with the reason."""
        return {i: why for i in range(start, len(self.blocks)) if (why := self.why_no_rows(i)) is not None}

    def _why_not_shared(self, whole: dict[int, str], count: int) -> str | None:
        """Return why `count` blocks don't run the shared prefix once, or None; `whole` are those with whole prompts."""
        if len(whole) == count > 0 or (whole and global_hooks()):
            return next(iter(whole.values()))
        for index in whole:
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
        """Map tokens [n, L], rows of some prompts, to the hidden states in front of the first block."""

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        """Causal mask, added to the logits, [1 or n, 1, L, L]; families may override it."""
        length = tokens.shape[1]
        return torch.full((1, 1, length, length), -torch.inf, device=tokens.device).triu(1)

    def lower(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        """Map tokens [n, L], rows of some prompts, to hidden states at the cut [n, L, W], in evaluation mode."""
        with self._evaluating_lower():
            return self._run_lower(self.embed(tokens, prompts), self.mask(tokens, prompts))

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Map hidden states [K, W] of the pooled tokens behind the last block to embeddings [K, D]."""

    def upper(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Map rows [R, W] of some prompts at the cut to text embeddings [K, D], not normalised."""
        whole = self._whole_blocks(self.skip)
        if selected.prompts.prefix_length and self._why_not_shared(whole, len(self.blocks) - self.skip) is None:
            return self.finish(self._run_suffixes(rows, selected, whole))
        return self.finish(self._run_whole_prompts(rows, selected))

    def _run_whole_prompts(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Run every block over whole prompts; return hidden states [K, W] of the pooled tokens."""
        features = selected.unpack(rows)  # [K, L, W]
        mask = self.mask(selected.tokens, selected.prompts)
        depth, save_inputs_only = len(self.blocks), self.saves_inputs_only(features)
        pools = self.skip < depth and self.why_no_rows(depth - 1) is None
        hidden = Hidden(features)
        for index in range(self.skip, depth - pools):
            hidden = self._run_block(index, hidden, mask, save_inputs_only=save_inputs_only)
        n, length, _ = features.shape
        prompts, positions = torch.arange(n, device=rows.device), selected.pooled  # [K] each
        if not pools:
            return hidden.sum()[prompts, positions]
        if mask is not None:  # its row at each pooled token: [1 or K, 1, L, L] -> [K, L]
            mask = mask.expand(n, 1, length, length)[prompts, 0, positions]
        last, ends = partial(attention.pooled, mask=mask), prompts * length + positions
        return self._run_last_block(hidden, last, ends, save_inputs_only=save_inputs_only)

    def _run_suffixes(self, rows: Tensor, selected: SelectedPrompts, whole: Container[int]) -> Tensor:
        """Run every block over the shared prefix and the suffixes; return hidden states [K, W] of the pooled tokens.

        Blocks in `whole` run over whole prompts.
        """
        depth, save_inputs_only, prompts = len(self.blocks), self.saves_inputs_only(rows), selected.prompts
        if self.skip == depth:
            return rows[selected.ends]
        attention_fn = partial(
            attention.suffixes,
            backend=self.attention_backend,
            prefix_length=prompts.prefix_length,
            offsets=selected.offsets,
            max_length=prompts.max_length,
            excludes_self=selected.ends if prompts.excludes_self else None,
        )
        hidden = Hidden(rows)
        pools = depth - 1 not in whole
        for index in range(self.skip, depth - pools):
            if index not in whole:
                hidden = self.blocks[index](hidden, RowsCall(attention_fn, save_inputs_only))
            else:
                hidden = self._run_on_whole_prompts(index, hidden, selected)
        if not pools:
            return hidden.sum()[selected.ends]
        last = partial(attention_fn, rows=selected.ends)
        return self.blocks[-1](hidden, RowsCall(last, save_inputs_only, selected.ends)).sum()

    def _run_on_whole_prompts(self, index: int, hidden: Hidden, selected: SelectedPrompts) -> Hidden:
        """Run a block that is not fused over whole prompts, unpacked from rows and packed again."""
        whole, mask = Hidden(selected.unpack(hidden.sum())), self.mask(selected.tokens, selected.prompts)
        return self._run_block(index, whole, mask, save_inputs_only=False).map(selected.pack)


def representative_classes(prompts: Prompts) -> Tensor:
    """Class ids [K] of the first and the last class, and of those with the shortest and the longest prompt."""
    ends = prompts.pooled
    return torch.unique(torch.stack([ends.new_zeros(()), ends.argmin(), ends.argmax(), ends.new_tensor(len(ends) - 1)]))
