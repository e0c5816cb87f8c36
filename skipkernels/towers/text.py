"""Text towers: prompts packed into rows, and their way from tokens, or from rows at the cut, to text embeddings."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..ops.packed_layout import packed_layout
from ..reference import without_autocast
from .base import Tower
from .rows import Pooled, RowsOptions, Suffixes

# ---- prompts ---------------------------------------------------------------------------------------------------------


class Pooling(NamedTuple):
    """Pooled tokens of prompts, and why a reduction is not exact for them; None where it is."""

    positions: Tensor  # int64 [C], of the pooled tokens
    why_not_shared: str | None = None  # why a prefix cannot be shared, such as a token that sees later ones
    why_not_cropped: str | None = None
    visible_length: int | None = None  # number of tokens that a pooled token can see; default: up to the last one


class Prompts:
    """One prompt of each class, and the layout of their hidden states as rows [R, W].

    With a shared prefix, the rows are those of the P = `prefix_length` tokens of the prefix, then those of each suffix
    up to its pooled token. Without a shared prefix, P = 0, and a suffix is the whole prompt.

    Attributes:
        tokens: int64 [C, L], cropped to the tokens that a pooled token can see.
        pooled: int64 [C], positions of the pooled tokens.
        given_length: Number of tokens of the prompts before they were cropped.
        prompt_length: Number of tokens of a whole prompt, L, or L + 1 with CoCa's class token, which has no token id.
        prefix_length: P.
        suffix_lengths: int64 [C], rows of each suffix.
        starts: int64 [C], the first of them.
        max_suffix_length: S, the largest of the lengths.
        has_equal_suffixes: True if all lengths are S: the rows of K classes are then counted without the device.
        row_count: R.
        first_row: The first of these rows in a table of several templates.
        most_rows: Upper bounds of the rows of any K different classes, by K: those of the K longest suffixes.
        why_not_cropped, why_not_shared: Why a reduction is not exact for the prompts; None where it is.
    """

    def __init__(self, tokens: Tensor, pooling: Pooling):
        # 1. Tokens that a pooled token can see
        self.pooled = pooled = pooling.positions
        self.given_length, needed_length = tokens.shape[1], int(pooled.max()) + 1
        self.why_not_cropped = pooling.why_not_cropped
        if self.why_not_cropped is None:
            tokens = tokens[:, : pooling.visible_length or needed_length].contiguous()
        self.tokens, self.prompt_length = tokens, max(tokens.shape[1], needed_length)
        # 2. The prefix
        self.prefix_length = P = 0 if pooling.why_not_shared else _shared_prefix_length(tokens, pooled)
        self.why_not_shared = pooling.why_not_shared or (None if P else "the prompts begin with different tokens")
        # 3. Rows of the prefix and of the suffixes
        lengths = pooled + 1 - P if P else torch.full_like(pooled, self.prompt_length)  # [C]
        self.suffix_lengths, self.starts = lengths, P + lengths.cumsum(0) - lengths  # [C] each
        self.row_count, self.first_row, self.max_suffix_length = P + int(lengths.sum()), 0, int(lengths.max())
        self.has_equal_suffixes = bool((lengths == self.max_suffix_length).all())
        self.most_rows = [P, *(P + lengths.sort(descending=True)[0].cumsum(0)).tolist()]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: getattr(self, name) for name in ("tokens", "pooled", "suffix_lengths", "starts")}

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, such as a move to a device, to every tensor."""
        for name, value in self.tensors().items():
            setattr(self, name, fn(value))

    def select(self, class_ids: Tensor) -> SelectedPrompts:
        """Return the layout of the prompts of K different classes, `class_ids` [K]."""
        return SelectedPrompts(self, class_ids)


def _shared_prefix_length(tokens: Tensor, pooled: Tensor) -> int:
    """Length of the prefix that all prompts [C, L] share, in front of every pooled token."""
    same = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()  # [C, L] -> [L] -> []
    return min(int(same), int(pooled.min()))


def counts_are_known(device: torch.device) -> bool:
    """Return True if the number of rows can be read on the host; on a GPU that would be a host sync."""
    return device.type == "cpu"


class SelectedPrompts:
    """Layout of the prompts of K different classes: the shared prefix, then their suffixes, one after the other.

        a photo of a | cat . end | hot dog . end | …      "|" begins a suffix; `end` is pooled

    Rows may follow the last suffix: on a GPU the number of rows is one that suffices for any K classes, since counting
    the rows of these K would need a host sync. The additional rows repeat other rows; attention neither reads them nor
    gives them a gradient.

    Attributes:
        row_count: R.
        row_numbers: int64 [R], indices of these rows among the rows of all classes.
        offsets: int64 [K + 1], start of each suffix, counted behind the prefix; None if all have the same length.
        last_rows: int64 [K], row of the last token of each class; with a shared prefix that is the pooled one.
    """

    def __init__(self, prompts: Prompts, class_ids: Tensor):
        self.prompts, self.class_ids = prompts, class_ids
        P, K, lengths = prompts.prefix_length, len(class_ids), prompts.suffix_lengths
        if prompts.has_equal_suffixes:
            self.row_count = P + K * prompts.max_suffix_length
        elif counts_are_known(class_ids.device):
            self.row_count = P + int(lengths[class_ids].sum())
        else:
            self.row_count = prompts.most_rows[K]
        self.row_numbers, offsets, self.last_rows = packed_layout(class_ids, prompts.starts, lengths, P, self.row_count)
        self.offsets = None if prompts.has_equal_suffixes else offsets

    @property
    def tokens(self) -> Tensor:
        """Tokens [K, L] of these prompts."""
        return self.prompts.tokens[self.class_ids]

    @property
    def pooled(self) -> Tensor:
        """Positions [K] of their pooled tokens."""
        return self.prompts.pooled[self.class_ids]

    def pack(self, hidden: Tensor) -> Tensor:
        """Pack hidden states [K, L, W] of these prompts into rows."""
        P, (K, L, _) = self.prompts.prefix_length, hidden.shape
        hidden = hidden.flatten(0, 1)  # [K · L, W]
        if not P:
            return hidden
        # `row_numbers` are of packed rows; here suffix k begins at row P + k · L of whole prompts.
        class_numbers = torch.arange(K, device=hidden.device)
        lengths = self.prompts.suffix_lengths[self.class_ids]  # [K]
        row_numbers, *_ = packed_layout(class_numbers, P + L * class_numbers, lengths, P, self.row_count)
        return hidden.index_select(0, row_numbers)  # [R, W]

    def unpack(self, rows: Tensor) -> Tensor:
        """Unpack rows [R, W] into whole prompts [K, L, W].

        Behind the pooled token the last row of the suffix is repeated; no token before attends to it.
        """
        P, (K, W) = self.prompts.prefix_length, (len(self.class_ids), rows.shape[1])
        if not P:
            return rows.view(K, -1, W)
        positions = torch.arange(self.prompts.prompt_length - P, device=rows.device)  # in the suffix
        first_rows = self.last_rows - self.prompts.suffix_lengths[self.class_ids] + 1  # [K]
        index = torch.minimum(first_rows[:, None] + positions, self.last_rows[:, None])  # [K, L - P]
        # The backward of `expand` adds the gradients of the prefix in a fixed order.
        prefix = rows[:P].expand(K, P, W)  # [K, P, W]
        return torch.cat([prefix, rows.index_select(0, index.flatten()).view(K, -1, W)], dim=1)  # [K, L, W]


# ---- the tower -------------------------------------------------------------------------------------------------------


class TextTower(Tower):
    """A tower over prompts. The embedding of a prompt is computed from its pooled token.

    Above the cut, if its blocks take rows and the prompts share a prefix, the rows are those of the prefix, once, then
    those of the suffix of each class.
    """

    @abstractmethod
    def pooling(self, tokens: Tensor) -> Pooling:
        """Find the pooled token of each prompt [C, L], and which reductions are not exact for them."""

    def read_prompts(self, tokens: Tensor) -> Prompts:
        """Lay out the rows of prompts [C, L], by every reduction that is exact for them."""
        return Prompts(tokens, self.pooling(tokens))

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

    def lower(self, selected: SelectedPrompts) -> Tensor:
        """Map prompts to rows [R, W] at the cut; with a cut constants, which do not depend on autocast."""
        prompts = selected.prompts

        def run(tokens: Tensor) -> Tensor:
            return self._run_lower_blocks(self.embed(tokens, prompts), self.mask(tokens, prompts))

        with without_autocast(selected.class_ids.device) if self.skip > 0 else contextlib.nullcontext():
            return selected.pack(self._run_lower(run, selected.tokens))

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Map hidden states [K, W] of the pooled tokens behind the last block to embeddings [K, D]."""

    def upper(self, rows: Iterable[Tensor], selected: Iterable[SelectedPrompts]) -> list[Tensor]:
        """Map rows [R, W] at the cut of the prompts of each template to text embeddings [K, D], not normalised."""
        templates = zip(rows, selected, strict=True)
        if not self.takes_rows_above:
            return [self.call_upper(*of_template) for of_template in templates]
        # Low-rank updates once, not for each template; not those of blocks that backward may call again
        with parametrize.cached():
            return [self._run_upper(*of_template) for of_template in templates]

    def call_upper(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Map rows [R, W] to embeddings [K, D] by blocks that are called as the model calls them."""
        mask = self.mask(selected.tokens, selected.prompts)
        hidden = self._call_upper_blocks(selected.unpack(rows), mask)  # [K, L, W]
        return self.finish(hidden[torch.arange(len(hidden), device=hidden.device), selected.pooled])

    def _run_upper(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Map rows [R, W] to embeddings [K, D] by blocks that take rows."""
        run = self._run_suffixes if selected.prompts.prefix_length else self._run_whole_prompts
        return self.finish(run(rows, selected))

    def _run_suffixes(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Run the shared prefix and the suffixes; return hidden states [K, W] of the pooled tokens."""
        prompts = selected.prompts
        attention = Suffixes(
            backend=self.cut.backend,
            prefix_length=prompts.prefix_length,
            offsets=selected.offsets,
            max_length=prompts.max_suffix_length,
            last_rows=selected.last_rows,
        )
        return self._run_upper_rows(rows, RowsOptions(attention), last_attention=replace(attention, only_last=True))

    def _run_whole_prompts(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        """Run whole prompts; return hidden states [K, W] of the pooled tokens."""
        features, mask = selected.unpack(rows), self.mask(selected.tokens, selected.prompts)
        K, L, _ = features.shape
        class_numbers, positions = torch.arange(K, device=features.device), selected.pooled  # [K] each
        # Rows of the mask at the pooled tokens: [1 or K, 1, L, L] -> [K, L]
        pooled_mask = None if mask is None else mask.expand(K, 1, L, L)[class_numbers, 0, positions]
        last_attention = Pooled(class_numbers * L + positions, pooled_mask)
        return self._run_upper_rows(features.flatten(0, 1), self._of_sequences(features, mask), last_attention)


def representative_classes(prompts: Prompts) -> Tensor:
    """Class ids [K] of the first and the last class, and of those with the shortest and the longest prompt."""
    ends = prompts.pooled
    return torch.unique(torch.stack([ends.new_zeros(()), ends.argmin(), ends.argmax(), ends.new_tensor(len(ends) - 1)]))
