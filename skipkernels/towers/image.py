"""Image towers: map images, or features at the cut, to image embeddings."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor, nn

from . import attention
from .base import Tower
from .fused_block import Hidden
from .reductions import Reduction


class ImageTower(Tower):
    """A tower over images [n, 3, height, width]."""

    image_size: tuple[int, int]  # Height and width

    def encoder(self) -> nn.Module:
        """The caller's image encoder, which returns embeddings [n, D] or a tuple that begins with them."""
        return self.model.visual

    @property
    def why_not_pooled(self) -> str | None:
        """Return why the last block is needed for every token, or None if the head pools the first one."""
        return None

    @property
    def reductions(self) -> dict[str, Reduction]:  # noqa: D102
        not_pooled = self.why_not_pooled or self.why_no_rows(len(self.blocks) - 1)
        return {
            "fused_block": Reduction.unless(self.why_not_fused()),
            "pooled_last_block": Reduction.unless(not_pooled),
        }

    def reference_forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.model.encode_image(inputs)

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """Map hidden states behind the last block, of all tokens or only the pooled one, to embeddings [n, D]."""

    def upper(self, features: Tensor) -> Tensor:
        """Map hidden states at the cut to image embeddings [n, D], not normalised."""
        depth, save_inputs_only = len(self.blocks), self.saves_inputs_only(features)
        hidden = Hidden(features)
        pools = self.skip < depth and self.why_not_pooled is None and self.why_no_rows(depth - 1) is None
        for index in range(self.skip, depth - pools):
            hidden = self._run_upper_block(index, hidden, None, save_inputs_only=save_inputs_only)
        if not pools:
            return self.finish(hidden.sum())
        n, tokens, _ = features.shape
        first = torch.arange(0, n * tokens, tokens, device=features.device)
        last = partial(attention.pooled, mask=None)
        pooled = self._run_last_block(hidden, last, first, save_inputs_only=save_inputs_only)
        return self.finish(pooled[:, None])
