"""open_clip's `HFTextEncoder`: a text encoder of Hugging Face's transformers, a pooler and a projection.

RoBERTa, XLM-RoBERTa and BERT normalise behind each half of a block; mT5 adds a learned bias by relative position,
which its first block owns and all use; NLLB is the encoder of M2M-100. In each a token sees all that are no padding:
blocks run as the modules that they are, over the prompts without the padding behind the longest.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..base import TextTower, UnsupportedModel


class EncoderTextTower(TextTower):
    """Such a text tower over the tokens of the task's classes; `pooled` is the last of each that is no padding."""

    def __init__(self, model: Any, tokens: Tensor, layers: nn.ModuleList):
        self.model, self.encoder = model, model.text.transformer
        self.blocks, self.padding = layers, model.text.config.pad_token_id
        words = tokens != self.padding
        runs = f"a block is a {type(layers[0]).__name__}, which runs as your module"
        last = words.long().cumsum(dim=1).argmax(dim=1)
        self.take(tokens, last, runs, causal="a token sees those behind it")

    def own(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.model.encode_text(inputs)

    def mask(self, inputs: Tensor) -> Tensor | None:  # noqa: D102
        hidden = torch.zeros(inputs.shape, device=inputs.device).masked_fill(inputs == self.padding, -torch.inf)
        return hidden[:, None, None].expand(-1, 1, inputs.shape[1], -1)

    @abstractmethod
    def end(self, hidden: Tensor) -> Tensor:
        """What the encoder does behind its last block."""

    def upper(self, rows: Tensor, class_ids: Tensor | None = None, *, of_all: bool = True) -> Tensor:  # noqa: D102
        hidden, tokens = self.prompts_of(rows, class_ids, of_all)
        mask = self.mask(tokens)
        for index in range(self.skip, len(self.blocks)):
            hidden = self._upper_block(index, hidden, mask, minimal=False)
        hidden = self.end(hidden)
        pooler = getattr(self.encoder, "pooler", None)
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=None if pooler is None else pooler(hidden)
        )
        return self.finish(self.model.text.pooler(output, (tokens != self.padding).long()))

    def finish(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.model.text.proj(hidden)


class RobertaTextTower(EncoderTextTower):
    """RoBERTa, XLM-RoBERTa, BERT."""

    def __init__(self, model: Any, tokens: Tensor):
        encoder = model.text.transformer
        super().__init__(model, tokens, encoder.encoder.layer)
        self.embedding, self.head = (encoder.embeddings,), (encoder.pooler, model.text.proj)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.encoder.embeddings(input_ids=inputs)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return _first(block(hidden, None if mask is None else mask.to(hidden)))

    def end(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return hidden


class MT5TextTower(EncoderTextTower):
    """The encoder of mT5."""

    def __init__(self, model: Any, tokens: Tensor):
        encoder = model.text.transformer
        super().__init__(model, tokens, encoder.block)
        self.embedding = (encoder.embed_tokens, encoder.dropout)
        self.head = (encoder.final_layer_norm, model.text.proj)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return self.encoder.dropout(self.encoder.embed_tokens(inputs))

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        length, first = hidden.shape[1], self.blocks[0].layer[0].SelfAttention
        bias = first.compute_bias(length, length, device=first.relative_attention_bias.weight.device).to(hidden)
        return _first(block(hidden, None if mask is None else mask.to(hidden), bias))

    def end(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.encoder.dropout(self.encoder.final_layer_norm(hidden))


class M2M100TextTower(EncoderTextTower):
    """The encoder of M2M-100, as in NLLB."""

    def __init__(self, model: Any, tokens: Tensor):
        encoder = model.text.transformer
        if encoder.layerdrop > 0:
            raise UnsupportedModel(
                "SkipCLIP: the text encoder skips whole blocks at random in training; make it with encoder_layerdrop=0."
            )
        super().__init__(model, tokens, encoder.layers)
        self.embedding = (encoder.embed_tokens, encoder.embed_positions)
        self.head = (encoder.layer_norm, model.text.proj)

    def embed(self, inputs: Tensor) -> Tensor:  # noqa: D102
        words = self.encoder.embed_tokens(inputs)
        hidden = words + self.encoder.embed_positions(inputs, words).to(words)
        return F.dropout(hidden, self.encoder.dropout, training=self.encoder.training and self.skip == 0)

    def call_block(self, block: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:  # noqa: D102
        return _first(block(hidden, None if mask is None else mask.to(hidden)))

    def end(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.encoder.layer_norm(hidden)


_TOWERS: dict[str, type[Any]] = {
    "RobertaModel": RobertaTextTower,
    "XLMRobertaModel": RobertaTextTower,
    "BertModel": RobertaTextTower,
    "MT5Stack": MT5TextTower,
    "T5Stack": MT5TextTower,
    "M2M100Encoder": M2M100TextTower,
}


def encoder_tower(model: Any, tokens: Tensor) -> EncoderTextTower:
    """The text tower of a model whose `text` is an `HFTextEncoder`."""
    text = model.text
    kind, attention = type(text.transformer), text.config._attn_implementation
    if kind.__name__ not in _TOWERS or not kind.__module__.startswith("transformers.models."):
        raise UnsupportedModel(
            f"SkipCLIP: of transformers' text encoders {', '.join(_TOWERS)} are handled; got {kind.__qualname__}."
        )
    if attention not in ("eager", "sdpa"):
        raise UnsupportedModel(
            f"SkipCLIP: the text encoder's attention is {attention!r}, which takes no mask of tokens; use "
            'model.text.transformer.set_attn_implementation("sdpa").'
        )
    return _TOWERS[kind.__name__](model, tokens)


def _first(output: Any) -> Tensor:
    """The hidden states of what a block returned: those alone in some versions of transformers, in others a tuple."""
    return output if isinstance(output, Tensor) else output[0]
