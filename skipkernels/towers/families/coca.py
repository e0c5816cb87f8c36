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
from ..prompts import Pooling, Prompts
from .open_clip import OpenClipTextTower, padding_mask


class CoCaTextTower(OpenClipTextTower):
    """Text tower with a `TextTransformer` as `text` that has a class embedding."""

    @property
    def embedding(self) -> tuple[Part, ...]:
        return *super().embedding, self.text.cls_emb

    @property
    def _excludes_self(self) -> bool:
        return not self.text.correct_cls_mask

    def _lengths(self, tokens: Tensor) -> Tensor:
        """Number of tokens of each prompt [n] without padding."""
        return (tokens != self.text.pad_id).sum(dim=1)

    def pooling(self, tokens: Tensor) -> Pooling:
        lengths, L = self._lengths(tokens), tokens.shape[1]
        padding_last = (tokens != self.text.pad_id).equal(torch.arange(L, device=tokens.device) < lengths[:, None])
        if padding_last and int(lengths.max()) + self._excludes_self <= L:  # the class token can move
            pooled = lengths + self._excludes_self
            not_shared = "the class token does not see itself (correct_cls_mask=False)" if self._excludes_self else None
            return Pooling(pooled, why_not_shared=not_shared, visible_length=int(pooled.max()))
        reason = "a prompt has padding in its middle (open_clip's padding is the token of '!'), or fills the context"
        return Pooling(torch.full_like(lengths, L), why_not_shared=reason, why_not_cropped=reason)

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        hidden = super().embed(tokens, prompts)
        token = self.text.cls_emb + self.text.positional_embedding[prompts.given_length]
        token = token.to(hidden.dtype).expand(len(hidden), 1, -1)
        hidden = torch.cat([hidden, token], dim=1)
        if prompts.why_not_cropped:
            return hidden
        ends = (self._lengths(tokens) + self._excludes_self)[:, None, None]
        return hidden.scatter(1, ends.expand_as(token), token)

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        if prompts.why_not_cropped:
            return padding_mask(self.text, tokens)
        length = tokens.shape[1] + 1
        mask = self.text.attn_mask[None, None, :length, :length].to(tokens.device)
        if not self._excludes_self:
            return mask
        ends = self._lengths(tokens) + 1
        mask = mask.repeat(len(tokens), 1, 1, 1)
        mask[torch.arange(len(tokens), device=mask.device), 0, ends, ends] = -torch.inf
        return mask


def text_transformer_tower(model: Any) -> OpenClipTextTower:
    """Build the text tower with a `TextTransformer` as `text`, with or without a class token."""
    return (OpenClipTextTower if model.text.cls_emb is None else CoCaTextTower)(model)
