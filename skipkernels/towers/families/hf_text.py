"""open_clip's `HFTextEncoder`: a text encoder of Hugging Face's transformers, a pooler and a projection.

RoBERTa, XLM-RoBERTa and BERT are post-norm. All blocks of mT5 add the learned relative position bias of the
first block. NLLB is the encoder of M2M-100. A token sees every token that is not padding, in most blocks of ModernBERT
only those in a window around it. Blocks run as the caller's modules, on prompts cropped to the longest one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..base import UnsupportedModel
from ..prompts import Pooling, Prompts, SelectedPrompts
from ..text import TextTower


class EncoderTextTower(TextTower):
    """Text tower with an `HFTextEncoder`; `pooled` is the last token of each prompt that is not padding."""

    def __init__(self, model: Any, layers: nn.ModuleList):
        self.model, self.encoder = model, model.text.transformer
        self.blocks, self.padding = layers, model.text.config.pad_token_id

    def pooling(self, tokens: Tensor) -> Pooling:
        last = (tokens != self.padding).long().cumsum(dim=1).argmax(dim=1)
        return Pooling(last, why_not_shared="a token sees later ones")

    def mask(self, tokens: Tensor, prompts: Prompts) -> Tensor | None:
        hidden = torch.zeros(tokens.shape, device=tokens.device).masked_fill(tokens == self.padding, -torch.inf)
        return hidden[:, None, None].expand(-1, 1, tokens.shape[1], -1)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        return _first(block(hidden, None if mask is None else mask.to(hidden)))

    def finish_encoder(self, hidden: Tensor) -> Tensor:
        """Apply the part of the encoder behind its last block."""
        return hidden

    def upper_by_calls(self, rows: Tensor, selected: SelectedPrompts) -> Tensor:
        tokens = selected.tokens
        hidden, mask = rows.unflatten(0, (len(tokens), -1)), self.mask(tokens, selected.prompts)
        hidden = self.finish_encoder(self._call_upper_blocks(hidden, mask))
        pooler = getattr(self.encoder, "pooler", None)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=None if pooler is None else pooler(hidden)
        )
        return self.finish(self.model.text.pooler(output, (tokens != self.padding).long()))

    def finish(self, hidden: Tensor) -> Tensor:
        return self.model.text.proj(hidden)


class RobertaTextTower(EncoderTextTower):
    """Text tower with RoBERTa, XLM-RoBERTa or BERT."""

    def __init__(self, model: Any):
        encoder = model.text.transformer
        super().__init__(model, encoder.encoder.layer)
        self.embedding, self.head = (encoder.embeddings,), (encoder.pooler, model.text.proj)

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        return self.encoder.embeddings(input_ids=tokens)


class MT5TextTower(EncoderTextTower):
    """Text tower with the encoder of mT5."""

    def __init__(self, model: Any):
        encoder = model.text.transformer
        super().__init__(model, encoder.block)
        self.embedding = (encoder.embed_tokens, encoder.dropout)
        self.head = (encoder.final_layer_norm, model.text.proj)

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        return self.encoder.dropout(self.encoder.embed_tokens(tokens))

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        length, first = hidden.shape[1], self.blocks[0].layer[0].SelfAttention
        bias = first.compute_bias(length, length, device=first.relative_attention_bias.weight.device).to(hidden)
        return _first(block(hidden, None if mask is None else mask.to(hidden), bias))

    def finish_encoder(self, hidden: Tensor) -> Tensor:
        return self.encoder.dropout(self.encoder.final_layer_norm(hidden))


class M2M100TextTower(EncoderTextTower):
    """Text tower with the encoder of M2M-100, as in NLLB."""

    def __init__(self, model: Any):
        encoder = model.text.transformer
        if encoder.layerdrop > 0:
            raise UnsupportedModel(
                "SkipCLIP: the text encoder drops whole blocks in training; create it with encoder_layerdrop=0."
            )
        super().__init__(model, encoder.layers)
        self.embedding = (encoder.embed_tokens, encoder.embed_positions)
        self.head = (encoder.layer_norm, model.text.proj)

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        words = self.encoder.embed_tokens(tokens)
        hidden = words + self.encoder.embed_positions(tokens, words).to(words)
        return F.dropout(hidden, self.encoder.dropout, training=self.encoder.training and self.skip == 0)

    def finish_encoder(self, hidden: Tensor) -> Tensor:
        return self.encoder.layer_norm(hidden)


class ModernBertTextTower(EncoderTextTower):
    """Text tower with ModernBERT: rotary positions in the blocks, with a base for each type of attention."""

    def __init__(self, model: Any):
        encoder = model.text.transformer
        super().__init__(model, encoder.layers)
        self.embedding = (encoder.embeddings, encoder.rotary_emb)
        self.head = (encoder.final_norm, model.text.proj)

    def embed(self, tokens: Tensor, prompts: Prompts) -> Tensor:
        return self.encoder.embeddings(input_ids=tokens)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        if block.attention_type == "sliding_attention":
            distance = (positions[:, None] - positions).abs()
            outside = torch.zeros_like(distance, dtype=hidden.dtype)
            # Finite: padding may have only padding in its window, and a row of -inf gives NaN.
            outside.masked_fill_(distance > self.encoder.config.sliding_window, torch.finfo(hidden.dtype).min)
            mask = outside if mask is None else mask + outside
        rotary = self.encoder.rotary_emb(hidden, positions[None], block.attention_type)
        return _first(
            block(hidden, attention_mask=None if mask is None else mask.to(hidden), position_embeddings=rotary)
        )

    def finish_encoder(self, hidden: Tensor) -> Tensor:
        return self.encoder.final_norm(hidden)


_TOWERS: dict[str, type[Any]] = {
    "RobertaModel": RobertaTextTower,
    "XLMRobertaModel": RobertaTextTower,
    "BertModel": RobertaTextTower,
    "MT5Stack": MT5TextTower,
    "T5Stack": MT5TextTower,
    "M2M100Encoder": M2M100TextTower,
    "ModernBertModel": ModernBertTextTower,
}


def encoder_tower(model: Any) -> EncoderTextTower:
    """Build the text tower with an `HFTextEncoder` as `text`."""
    text = model.text
    kind, attention = type(text.transformer), text.config._attn_implementation
    if kind.__name__ not in _TOWERS or not kind.__module__.startswith("transformers.models."):
        raise UnsupportedModel(
            f"SkipCLIP: the text encoder must be one of {', '.join(_TOWERS)} of transformers; got {kind.__qualname__}."
        )
    if attention not in ("eager", "sdpa"):
        raise UnsupportedModel(
            f"SkipCLIP: the text encoder's attention is {attention!r}, which takes no mask of tokens; use "
            'model.text.transformer.set_attn_implementation("sdpa").'
        )
    return _TOWERS[kind.__name__](model)


def _first(output: Any) -> Tensor:
    """Hidden states that a block returned: a tensor or a tuple, depending on the version of transformers."""
    return output if isinstance(output, Tensor) else output[0]
