"""The text tower of open_clip's `CoCa`: a causal text transformer that reads its embedding off a class token.

The class token comes last, behind the padding, and sees the prompt. In the published weights its mask is one position
late: it sees the prompt and one token of padding, and not itself (`correct_cls_mask=False`). Attention here knows of
positions from their embedding alone, so the class token may stand right behind what it sees; the padding is then what
comes last, nobody looks at it, and it can be left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .open_clip import OpenClipTextTower, hidden_padding


class CoCaTextTower(OpenClipTextTower):
    """A `TextTransformer` with a class embedding, over the tokens of the task's classes."""

    def __init__(self, model, tokens: Tensor):
        self._blind = not model.text.correct_cls_mask
        words, L = self._words(model.text.pad_id, tokens), tokens.shape[1]
        self._position = L  # of the class token, wherever it stands
        padding_behind = (tokens != model.text.pad_id).equal(torch.arange(L, device=tokens.device) < words[:, None])
        self._moved = padding_behind and int(words.max()) + self._blind <= L
        super().__init__(model, tokens)
        self.embedding = (*self.embedding, self.text.cls_emb)

    @staticmethod
    def _words(pad_id: int, tokens: Tensor) -> Tensor:
        return (tokens != pad_id).sum(dim=1)

    def _pooled_positions(self, tokens: Tensor) -> Tensor:
        if not self._moved:
            return tokens.new_full((len(tokens),), tokens.shape[1])
        return self._words(self.text.pad_id, tokens) + self._blind

    def _seen(self, tokens: Tensor) -> dict[str, Any]:
        pooled = self._pooled_positions(tokens)
        if self._moved:
            return {"pooled": pooled, "length": int(pooled.max()), "blind": self._blind}
        reason = "a prompt has padding in its middle (open_clip's padding is the token of '!'), or fills the context"
        return {"pooled": pooled, "causal": reason, "crop": reason}

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        words, token = super().embed(inputs), self.text.cls_emb + self.text.positional_embedding[self._position]
        token = token.to(words.dtype).expand(len(words), 1, -1)
        hidden = torch.cat([words, token], dim=1)
        if not self._moved:
            return hidden
        ends = self._pooled_positions(inputs)[:, None, None]
        return hidden.scatter(1, ends.expand_as(token), token)

    def mask(self, inputs: Tensor) -> Tensor | None:  # noqa: D102
        if not self._moved:
            return hidden_padding(self.text, inputs)
        length = inputs.shape[1] + 1
        mask = self.text.attn_mask[None, None, :length, :length].to(inputs.device)
        if not self._blind:
            return mask
        ends = self._pooled_positions(inputs)
        mask = mask.repeat(len(inputs), 1, 1, 1)
        mask[torch.arange(len(inputs), device=mask.device), 0, ends, ends] = -torch.inf
        return mask


def text_tower(model: Any, tokens: Tensor) -> OpenClipTextTower:
    """The text tower of a model whose `text` is a `TextTransformer`, with a class token or without."""
    return (OpenClipTextTower if model.text.cls_emb is None else CoCaTextTower)(model, tokens)
