"""Prompts packed into rows: the prefix that all prompts share, stored once, then the suffix of each class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.packed_layout import packed_layout


def shared_prefix_length(tokens: Tensor, pooled: Tensor, *, excludes_self: bool = False) -> int:
    """Length of the prefix that all prompts [C, L] share, in front of every pooled token [C].

    With `excludes_self` a pooled token does not attend to itself: its query is computed at the row before it, which
    must then be in the suffix.
    """
    same = (tokens == tokens[:1]).all(dim=0).long().cumprod(dim=0).sum()  # [C, L] -> [L] -> []
    return max(min(int(same), int(pooled.min()) - excludes_self), 0)


def reads_row_counts(device: torch.device) -> bool:
    """Return True if the number of packed rows of a step is read on the host: on a GPU that would be a host sync."""
    return device.type == "cpu"


class Prompts:
    """One prompt of each class, int64 [C, L], and the layout of their hidden states as rows [R, W].

    With a shared prefix, the rows are those of the P = `prefix_length` tokens of the prefix, then those of each suffix
    up to its pooled token, at position `pooled` [C]. Without a shared prefix (P = 0), each class has the rows of its
    whole prompt. With `excludes_self` a pooled token attends to the tokens in front of it and not to itself.

    Attributes:
        lengths: int64 [C], rows of each suffix.
        starts: int64 [C], the first of them.
        max_length: S, the largest of the lengths.
        row_count: R.
        given_length: Number of tokens of the prompts before they were cropped.
        not_cropped, not_shared: Why these reductions are not exact for the prompts, or None.
    """

    def __init__(
        self,
        tokens: Tensor,
        pooled: Tensor,
        prefix_length: int,
        *,
        excludes_self: bool = False,
        given_length: int | None = None,
        not_cropped: str | None = None,
        not_shared: str | None = None,
    ):
        self.tokens, self.pooled = tokens, pooled
        self.given_length, self.not_cropped, self.not_shared = given_length, not_cropped, not_shared
        self.prefix_length, self.excludes_self = prefix_length, excludes_self
        # CoCa appends a token that has no token id.
        self.length = length = max(tokens.shape[1], int(pooled.max()) + 1)  # Number of tokens of a whole prompt
        self.lengths = pooled + 1 - prefix_length if prefix_length else torch.full_like(pooled, length)  # [C]
        self.starts = prefix_length + self.lengths.cumsum(0) - self.lengths  # [C]
        self.max_length, self.row_count = int(self.lengths.max()), prefix_length + int(self.lengths.sum())
        self.same_length = bool((self.lengths == self.max_length).all())  # True if all suffixes have S rows
        # Bound of the rows of any K classes: those of the K longest suffixes.
        self._capacities = [prefix_length, *(prefix_length + self.lengths.sort(descending=True)[0].cumsum(0)).tolist()]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn`, such as a move to a device, to every tensor."""
        for name, value in self.tensors().items():
            setattr(self, name, fn(value))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def capacity(self, classes: int) -> int:
        """Number of rows that suffices for any `classes` different classes."""
        return self._capacities[classes]

    def pack(self, hidden: Tensor, class_ids: Tensor | None = None) -> Tensor:
        """Pack hidden states [K, L, W] of `class_ids` (default: all classes) into rows."""
        if class_ids is None:
            class_ids = torch.arange(len(self.tokens), device=self.tokens.device)
        return self.select(class_ids, exact=True).pack(hidden)

    def select(self, class_ids: Tensor, *, exact: bool = False) -> SelectedPrompts:
        """Return the layout of the prompts of `class_ids` [K] in a step.

        With `exact` no row follows the last suffix, and ids may repeat; on a GPU this needs a host sync.
        """
        return SelectedPrompts(self, class_ids, exact or self.same_length or reads_row_counts(class_ids.device))


class SelectedPrompts:
    """Layout of the prompts of K classes in a step: the shared prefix, then their suffixes, one after the other.

    Rows may follow the last suffix: on a GPU the number of rows is one that suffices for any K classes, since counting
    the rows of these K would need a host sync. The additional rows repeat other rows; attention neither reads them nor
    gives them a gradient.

    Attributes:
        row_count: R.
        row_numbers: int64 [R], indices of these rows among the rows of all classes.
        offsets: int64 [K + 1], start of each suffix, counted behind the prefix; None if all have the same length.
        ends: int64 [K], row of the pooled token of each class; with a shared prefix.
    """

    def __init__(self, prompts: Prompts, class_ids: Tensor, exact: bool):
        self.prompts, self.class_ids = prompts, class_ids
        P, K = prompts.prefix_length, len(class_ids)
        if prompts.same_length:
            self.row_count = P + K * prompts.max_length
        elif exact:
            self.row_count = P + int(prompts.lengths[class_ids].sum())
        else:
            self.row_count = prompts.capacity(K)
        self.row_numbers, offsets, self.ends = packed_layout(
            class_ids, prompts.starts, prompts.lengths, P, self.row_count
        )
        self.offsets = None if prompts.same_length else offsets

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
        prompts = torch.arange(K, device=hidden.device)
        lengths = self.prompts.lengths[self.class_ids]  # [K]
        row_numbers, *_ = packed_layout(prompts, P + L * prompts, lengths, P, self.row_count)
        return hidden.index_select(0, row_numbers)  # [R, W]

    def unpack(self, rows: Tensor) -> Tensor:
        """Unpack rows [R, W] into whole prompts [K, L, W].

        Behind the pooled token the last row of the suffix is repeated; no token before attends to it.
        """
        P, (K, W) = self.prompts.prefix_length, (len(self.class_ids), rows.shape[1])
        if not P:
            return rows.view(K, -1, W)
        suffix = torch.arange(self.prompts.length - P, device=rows.device)
        first = self.ends - self.prompts.lengths[self.class_ids] + 1  # [K]
        index = torch.minimum(first[:, None] + suffix, self.ends[:, None])  # [K, L - P]
        # The backward of `expand` adds the gradients of the prefix in a fixed order.
        prefix = rows[:P].expand(K, P, W)  # [K, P, W]
        return torch.cat([prefix, rows.index_select(0, index.flatten()).view(K, -1, W)], dim=1)  # [K, L, W]
