"""`ModernTextTransformer` of open_clip 4: rotary positions, RMSNorm, SwiGLU, gated attention, value residuals.

Blocks run as the caller's modules, on prompts cropped to the longest one. Pooling is at the end of text, or over all
tokens that are not padding. With value residuals each block reads the values of the first one, which are kept beside
the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..base import Part, UnsupportedModel
from ..prompts import Pooling, Prompts, SelectedPrompts
from ..text import TextTower


class ModernTextTower(TextTower):
    """Text tower of a `CustomTextCLIP` with a `ModernTextTransformer` as `text`.

    Hidden states are [n, L, W], or with value residuals [n, L, 2W] behind the first block.
    """

    def __init__(self, model: Any):
        self.model, self.text = model, model.text
        if self.text.num_reg:
            raise UnsupportedModel(
                "SkipCLIP: the text tower puts register tokens in front of the prompt, which have no token ids; one "
                "without them (reg_tokens=0) is handled."
            )
        self.blocks = self.text.blocks

    @property
    def embedding(self) -> tuple[Part, ...]:
        return self.text.token_embedding, self.text.norm_pre, self.text.rope

    @property
    def head(self) -> tuple[Part, ...]:
        return self.text.ln_final, self.text.pool, self.text.text_projection

    def pooling(self, tokens: Tensor) -> Pooling:
        last = self._valid(tokens).long().cumsum(dim=1).argmax(dim=1)  # [C], the last token that is not padding
        ends, not_causal = last, None
        if self.text.pool.pool_type == "eos":
            end = tokens == self.text.eos_id
            ends = torch.where(end.any(dim=1), end.int().argmax(dim=1), self._valid(tokens).sum(dim=1) - 1)
        else:
            not_causal = "the tower pools over all tokens"
        if self.text.cfg.attention_mode != "causal":
            not_causal = "a token sees later ones"
        visible = int(torch.maximum(last, ends).max()) + 1
        return Pooling(ends, why_not_shared=not_causal, visible_length=visible)

    def _valid(self, tokens: Tensor) -> Tensor:
        return self.text._valid_mask(tokens)

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        return self.text.norm_pre(self.text.token_embedding(tokens).to(self.text.get_cast_dtype()))

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        return self.text._attn_inputs(tokens, self.text.get_cast_dtype())[1]

    def call_block(self, block: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        width, rope = self.text.width, self.text.rope
        positions = None if rope is None else rope(hidden.shape[1], hidden.device, hidden.dtype)
        values = None
        if hidden.shape[2] > width:
            hidden, values = hidden.split(width, dim=2)
            values = values.unflatten(2, (block.attn.heads, -1)).transpose(1, 2)  # [n, H, L, E]
        out, values = block(hidden, rope_embed=positions, key_bias=mask, is_causal=mask is None, v_first=values)
        return out if values is None else torch.cat([out, values.transpose(1, 2).flatten(2)], dim=2)

    def upper_by_calls(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        tokens = selected.tokens
        mask = self.mask(tokens, selected.prompts)
        hidden = self._call_upper_blocks(selected.unpack(rows), mask)
        normed = self.text.ln_final(hidden[..., : self.text.width])
        return self.finish(self.text.pool(normed, text=tokens, valid=self._valid(tokens), eos_id=self.text.eos_id))

    def finish(self, hidden: Tensor) -> Tensor:
        projection = self.text.text_projection
        return hidden if projection is None else projection(hidden)
