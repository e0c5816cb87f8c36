"""Models of every supported kind with random weights and few blocks, otherwise unchanged, and prompts for them."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
import transformers
from open_clip.factory import get_model_config
from torch import nn

from tests.models import openai_models

BLOCKS = 3
NAME_LENGTHS = (1, 2, 3, 1)  # tokens of each class's name
# Key of a config → class of its models, which have no image and text tower.
WITHOUT_PAIR = {
    "audio_cfg": "clap_model.CLAP",
    "genlip_cfg": "naflex_genlip_model.NaFlexGenLip",
    "genlap_cfg": "naflex_genlap_model.NaFlexGenLap",
}
VOCABULARY = 3000  # one of 50,000 to 256,000 tokens would dominate the time

# Published settings of these text encoders, with fewer layers and a smaller vocabulary.
_ROBERTA = {"num_hidden_layers": BLOCKS, "vocab_size": VOCABULARY, "max_position_embeddings": 514, "pad_token_id": 1}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
_MT5 = {"num_layers": BLOCKS, "vocab_size": VOCABULARY, "d_kv": 64}
_NLLB = {"d_model": 1024, "encoder_layers": BLOCKS, "decoder_layers": 1, "vocab_size": VOCABULARY}
_NLLB |= {"encoder_layerdrop": 0}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
ENCODERS: dict[str, Callable[[], Any]] = {
    "roberta-base": lambda: transformers.RobertaConfig(**_ROBERTA, type_vocab_size=1),
    "xlm-roberta-base": lambda: transformers.XLMRobertaConfig(**_ROBERTA, type_vocab_size=1),
    "xlm-roberta-large": lambda: transformers.XLMRobertaConfig(**_ROBERTA, **_LARGE, type_vocab_size=1),
    "google/mt5-base": lambda: transformers.MT5Config(**_MT5, d_model=768, d_ff=2048, num_heads=12),
    "google/mt5-xl": lambda: transformers.MT5Config(**_MT5, d_model=2048, d_ff=5120, num_heads=32),
    "facebook/nllb-200-distilled-600M": lambda: transformers.M2M100Config(**_NLLB, encoder_ffn_dim=4096),
    "facebook/nllb-200-distilled-1.3B": lambda: transformers.M2M100Config(**_NLLB, encoder_ffn_dim=8192),
    "Alibaba-NLP/gte-modernbert-base": lambda: transformers.ModernBertConfig(
        num_hidden_layers=BLOCKS, vocab_size=VOCABULARY, pad_token_id=1, **dict.fromkeys(_TOKEN_IDS, 0)
    ),
}


def make(name: str) -> tuple[Any, torch.Tensor]:
    """The model of a name in OTHERS, or of an open_clip config, and its prompts."""
    torch.manual_seed(0)
    return OTHERS[name]() if name in OTHERS else of_open_clip(name)


def of_open_clip(name: str) -> tuple[Any, torch.Tensor]:
    """A model with few blocks from an open_clip config, and its prompts."""
    config = get_model_config(name)
    for key, path in WITHOUT_PAIR.items():
        if key in config:
            return not_initialized(path), prompts({})
    make_small(config)
    kind, text = class_of(config), config["text_cfg"]
    config.pop("custom_text", None)  # no argument of a class
    with few_blocks_of_timm(), tempfile.TemporaryDirectory() as folder:
        if "hf_model_name" not in text:
            return kind(**config), prompts(text)
        encoder = ENCODERS[text["hf_model_name"]]()
        encoder.save_pretrained(folder)  # a folder in place of a name: nothing is downloaded
        text |= {"hf_model_name": folder, "hf_model_pretrained": False}
        return kind(**config), encoder_prompts(encoder.pad_token_id)


def not_initialized(path: str) -> nn.Module:
    """An object of a class of open_clip without its weights."""
    module, _, name = path.partition(".")
    kind = getattr(importlib.import_module(f"open_clip.{module}"), name)
    nn.Module.__init__(model := kind.__new__(kind))
    return model


def make_small(config: dict[str, Any]) -> None:
    """Change a config to few blocks and a small vocabulary."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    for part in (vision, text):
        layers = part.get("layers", 12)
        part["layers"] = [1] * len(layers) if isinstance(layers, list) else min(layers, BLOCKS)
    text["vocab_size"] = VOCABULARY
    if text.get("text_arch") == "modern":  # its special tokens are the last ones
        text |= {"eos_id": VOCABULARY - 1, "bos_id": VOCABULARY - 2, "pad_id": VOCABULARY - 3}


def class_of(config: dict[str, Any]) -> type[nn.Module]:
    """The class that open_clip makes of a config."""
    if "multimodal_cfg" in config:
        return open_clip.CoCa
    if config.get("custom_text") or {"timm_model_name", "hf_model_name", "text_arch"} & {
        *config["vision_cfg"],
        *config["text_cfg"],
    }:
        return open_clip.CustomTextCLIP
    return open_clip.CLIP


@contextlib.contextmanager
def few_blocks_of_timm() -> Iterator[None]:
    """Make timm create models with few blocks; open_clip passes only their names."""
    create = timm.create_model

    def create_small(name: str, **rest: Any) -> Any:
        with torch.device("meta"):
            whole = create(name)
        stages = getattr(whole, "stages", getattr(whole, "layers", None))
        if stages is None:
            return create(name, **{**rest, "depth": BLOCKS})
        each = (1,) * (len(stages) - 1) + (2,)
        return create(name, **rest, **{"layers" if type(whole).__name__ == "FastVit" else "depths": each})

    with mock.patch.object(timm, "create_model", create_small):
        yield


def of_openai(vision_layers: Any, width: int, patch: int | None, heads: int) -> tuple[Any, torch.Tensor]:
    """A model of OpenAI's class."""
    model = openai_models().CLIP(512, 224, vision_layers, width, patch, 77, 49408, 512, heads, BLOCKS)
    return model, prompts({})


def of_hugging_face(config: Any, **changes: Any) -> tuple[Any, torch.Tensor]:
    """A model of Hugging Face's class with its default config, that of the base model."""
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = BLOCKS
    text = config.text_config
    tokens = prompts({"vocab_size": text.vocab_size, "context_length": text.max_position_embeddings})
    return transformers.AutoModel.from_config(config, **changes), tokens


OTHERS: dict[str, Callable[[], tuple[Any, torch.Tensor]]] = {
    "OpenAI clip, ViT-B/32": lambda: of_openai(BLOCKS, 768, 32, 8),
    "OpenAI clip, RN50": lambda: of_openai((1, 1, 1, 1), 64, None, 8),
    "transformers CLIPModel, ViT-B/32": lambda: of_hugging_face(transformers.CLIPConfig()),
    "transformers CLIPModel, eager attention": lambda: of_hugging_face(
        transformers.CLIPConfig(), attn_implementation="eager"
    ),
    "transformers MetaClip2Model, ViT-B/32": lambda: of_hugging_face(transformers.MetaClip2Config()),
    "transformers SiglipModel, ViT-B/16": lambda: of_hugging_face(transformers.SiglipConfig()),
    "transformers Siglip2Model, ViT-B/16, 256 patches": lambda: of_hugging_face(transformers.Siglip2Config()),
    "transformers AltCLIPModel": lambda: of_hugging_face(transformers.AltCLIPConfig()),
    "transformers ChineseCLIPModel": lambda: of_hugging_face(transformers.ChineseCLIPConfig()),
    "transformers CLIPSegModel": lambda: of_hugging_face(transformers.CLIPSegConfig()),
}


def prompts(text: dict[str, Any]) -> torch.Tensor:
    """Prompts [C, L] of one template, made without a tokenizer; some tokenizers need packages and downloads."""
    vocabulary = text.get("vocab_size", 49408)
    has_end = text.get("pool_type") == "eos" or text.get("text_arch") == "modern"
    end = text.get("eos_id", 2) if has_end else vocabulary - 1
    padding = text["pad_id"] if text.get("text_arch") == "modern" else 0
    tokens = torch.full((len(NAME_LENGTHS), text.get("context_length", 77)), padding)
    for i, length in enumerate(NAME_LENGTHS):
        name = range(100 * (i + 1), 100 * (i + 1) + length)
        prompt = [vocabulary - 2, 320, 1125, 539, *name, end]
        tokens[i, : len(prompt)] = torch.tensor(prompt)
    return tokens


def encoder_prompts(padding: int) -> torch.Tensor:
    """Prompts [C, L] for a text encoder of transformers."""
    tokens = prompts({"vocab_size": VOCABULARY})
    return torch.where(tokens == 0, padding, tokens)
