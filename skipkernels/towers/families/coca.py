"""Text tower of open_clip's `CoCa`: a causal text transformer with the embedding at a class token.

The class token comes last, behind the padding, and sees the prompt. In the published weights its mask is shifted by one
position: it sees the prompt and one token of padding, and not itself (`correct_cls_mask=False`). Attention depends
on positions only through their embedding, so the class token is moved directly behind the tokens that it sees. No token
then sees the padding behind it, which is cropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import Part
from .open_clip import OpenClipTextTower, padding_mask


class CoCaTextTower(OpenClipTextTower):
    """Text tower with a `TextTransformer` as `text` that has a class embedding."""

    @property
    def embedding(self) -> tuple[Part, ...]:
        return *super().embedding, self.text.cls_emb

    def read_prompts(self, tokens: Tensor) -> None:
        self._excludes_self = not self.text.correct_cls_mask
        lengths, L = self._lengths(self.text.pad_id, tokens), tokens.shape[1]
        self._position = L  # index of the class token's positional embedding
        padding_last = (tokens != self.text.pad_id).equal(torch.arange(L, device=tokens.device) < lengths[:, None])
        self._moved = padding_last and int(lengths.max()) + self._excludes_self <= L
        super().read_prompts(tokens)

    @staticmethod
    def _lengths(pad_id: int, tokens: Tensor) -> Tensor:
        """Number of tokens of each prompt [n] without padding."""
        return (tokens != pad_id).sum(dim=1)

    def _pooled_positions(self, tokens: Tensor) -> Tensor:
        if not self._moved:
            return tokens.new_full((len(tokens),), tokens.shape[1])
        return self._lengths(self.text.pad_id, tokens) + self._excludes_self

    def _prompt_layout(self, tokens: Tensor) -> dict[str, Any]:
        pooled = self._pooled_positions(tokens)
        if self._moved:
            return {"pooled": pooled, "visible_length": int(pooled.max()), "excludes_self": self._excludes_self}
        reason = "a prompt has padding in its middle (open_clip's padding is the token of '!'), or fills the context"
        return {"pooled": pooled, "not_causal": reason, "not_cropped": reason}

    def embed(self, inputs: Tensor) -> Tensor:
        prompts, token = super().embed(inputs), self.text.cls_emb + self.text.positional_embedding[self._position]
        token = token.to(prompts.dtype).expand(len(prompts), 1, -1)
        hidden = torch.cat([prompts, token], dim=1)
        if not self._moved:
            return hidden
        ends = self._pooled_positions(inputs)[:, None, None]
        return hidden.scatter(1, ends.expand_as(token), token)

    def mask(self, inputs: Tensor) -> Tensor | None:
        if not self._moved:
            return padding_mask(self.text, inputs)
        length = inputs.shape[1] + 1
        mask = self.text.attn_mask[None, None, :length, :length].to(inputs.device)
        if not self._excludes_self:
            return mask
        ends = self._pooled_positions(inputs)
        mask = mask.repeat(len(inputs), 1, 1, 1)
        mask[torch.arange(len(inputs), device=mask.device), 0, ends, ends] = -torch.inf
        return mask


def text_tower(model: Any, tokens: Tensor) -> OpenClipTextTower:
    """Build the text tower with a `TextTransformer` as `text`, with or without a class token."""
    return (OpenClipTextTower if model.text.cls_emb is None else CoCaTextTower)(model, tokens)
