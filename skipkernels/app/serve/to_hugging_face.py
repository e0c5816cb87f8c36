"""Conversion of an open_clip CLIP to transformers' CLIPModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from ...formatting import first_line
from ..data import InputError
from ..data.files import format_names
from ..data.templates import prompts
from .loading import TunedRun

_TOLERANCE = 1e-4  # largest distance between unit-norm embeddings before and after the conversion
_RESAMPLE = {"bilinear": 2, "bicubic": 3, "random": 3}  # Pillow's numbers
_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_BLOCK |= {"attn.out_proj": "self_attn.out_proj"}


def write(run: TunedRun, folder: Path) -> list[str]:
    """Write a CLIPModel with its processor; return notes on the classes with other tokens in transformers."""
    try:
        from transformers import CLIPProcessor, PreTrainedModel
    except ImportError:
        raise InputError(
            "hugging-face needs transformers: pip install 'skipkernels[hugging-face]'.", "to", "export"
        ) from None
    if isinstance(run.model, PreTrainedModel):  # the run's model came from such a folder
        run.model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        return []
    converted, tokenizer = convert(run), _tokenizer(run)
    processor = CLIPProcessor(_image_processor(run), tokenizer)
    converted.save_pretrained(folder)
    processor.save_pretrained(folder)
    return _other_tokens(run, tokenizer)


# ---- model -----------------------------------------------------------------------------------------------------------


def convert(run: TunedRun) -> Any:
    """Return a CLIPModel with the weights of the model, after a comparison of the embeddings of both."""
    from transformers import CLIPConfig, CLIPModel

    _check(run)
    try:
        converted = CLIPModel(CLIPConfig(**config(run.model)))
        converted.load_state_dict(state_dict(run.model))
    except (AttributeError, KeyError, RuntimeError) as error:
        raise _error(f"it has no counterpart there ({first_line(error)})") from error
    converted.eval()
    _compare(run, converted)
    return converted


def _check(run: TunedRun) -> None:
    """Raise an InputError that names a part of the model that the comparison of embeddings does not detect."""
    model = run.model
    resize_mode, interpolation = (_preprocessing(run)[name] for name in ("resize_mode", "interpolation"))
    unusual = {
        f"is a {type(model).__name__}": type(model) is not CLIP,
        f"has a {type(model.visual).__name__} as image tower": type(model.visual) is not VisionTransformer,
        "has a logit bias": getattr(model, "logit_bias", None) is not None,
        "has a tokenizer other than CLIP's": not isinstance(run.tokenizer, SimpleTokenizer),
        f"has the resize mode {resize_mode!r}": resize_mode not in ("shortest", "squash"),
        f"has the interpolation {interpolation!r}": interpolation not in _RESAMPLE,
    }
    for problem, found in unusual.items():
        if found:
            raise _error(f"it {problem}")


def config(model: Any) -> dict[str, Any]:
    """Return the arguments of transformers' CLIPConfig for an open_clip CLIP."""
    visual, embed_dim = model.visual, model.visual.proj.shape[1]

    def tower(blocks: Any) -> dict[str, Any]:
        first = blocks[0]
        return {
            "hidden_size": first.attn.embed_dim,
            "intermediate_size": first.mlp.c_fc.out_features,
            "num_hidden_layers": len(blocks),
            "num_attention_heads": first.attn.num_heads,
            "hidden_act": _activation(first),
            "layer_norm_eps": first.ln_1.eps,
            "projection_dim": embed_dim,
        }

    vocabulary = model.token_embedding.num_embeddings
    text = {"vocab_size": vocabulary, "max_position_embeddings": model.context_length}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    image = {"image_size": visual.image_size[0], "patch_size": visual.patch_size[0]}
    return {
        "text_config": tower(model.transformer.resblocks) | text,
        "vision_config": tower(visual.transformer.resblocks) | image,
        "projection_dim": embed_dim,
        "logit_scale_init_value": model.logit_scale.item(),
    }


def _activation(block: Any) -> str:
    """Return the name of the activation of a block in transformers; KeyError if it has none."""
    activation = block.mlp.gelu
    if type(activation) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[activation.approximate]
    return {QuickGELU: "quick_gelu"}[type(activation)]


def state_dict(model: Any) -> dict[str, Tensor]:
    """Return the weights of an open_clip CLIP under the names of transformers' CLIPModel."""
    visual, projection = model.visual, model.text_projection
    found = {
        "logit_scale": model.logit_scale.reshape(()),
        "visual_projection.weight": visual.proj.T,
        "text_projection.weight": projection.T if isinstance(projection, nn.Parameter) else projection.weight,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": model.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": model.positional_embedding,
    }
    norms = {"vision_model.pre_layrnorm": visual.ln_pre, "vision_model.post_layernorm": visual.ln_post}
    for name, norm in (norms | {"text_model.final_layer_norm": model.ln_final}).items():
        found |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    towers = {"vision_model": visual.transformer, "text_model": model.transformer}
    for tower, transformer in towers.items():
        for number, block in enumerate(transformer.resblocks):
            prefix = f"{tower}.encoder.layers.{number}."
            for name, other in _BLOCK.items():
                module = block.get_submodule(name)
                found |= {f"{prefix}{other}.weight": module.weight, f"{prefix}{other}.bias": module.bias}
            packed = zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
            for part, weight, bias in packed:
                found |= {f"{prefix}self_attn.{part}_proj.weight": weight, f"{prefix}self_attn.{part}_proj.bias": bias}
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def _compare(run: TunedRun, converted: Any) -> None:
    """Compare embeddings of random images and of prompts before and after the conversion."""
    model = run.model
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *model.visual.image_size, generator=generator)
    tokens = run.tokenizer(_prompts(run)[:4])
    outputs = converted(input_ids=tokens, pixel_values=images)
    pairs = {
        "image": (model.encode_image(images, normalize=True), outputs.image_embeds),
        "text": (model.encode_text(tokens, normalize=True), outputs.text_embeds),
    }
    for side, (before, after) in pairs.items():
        error = (before - F.normalize(after, dim=-1)).abs().max().item()
        if not error <= _TOLERANCE:
            raise _error(f"its {side} embeddings differ by {error:.1e} after the conversion")


def _error(problem: str) -> InputError:
    return InputError(f"must have a model that CLIPModel can hold; {problem}. Use open-clip.", "run", "export")


# ---- processor -------------------------------------------------------------------------------------------------------


def _tokenizer(run: TunedRun) -> Any:
    from transformers import CLIPTokenizer

    own = run.tokenizer
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {special.get(token, token): number for token, number in own.encoder.items()}
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.__getitem__)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=run.model.context_length)


def _image_processor(run: TunedRun) -> Any:
    from transformers import CLIPImageProcessor

    settings = _preprocessing(run)
    size = run.model.visual.image_size[0]
    square = {"height": size, "width": size}
    squash = settings["resize_mode"] == "squash"
    return CLIPImageProcessor(
        size=square if squash else {"shortest_edge": size},
        crop_size=square,
        do_center_crop=not squash,
        resample=_RESAMPLE[settings["interpolation"]],
        image_mean=list(settings["mean"]),
        image_std=list(settings["std"]),
    )


def _other_tokens(run: TunedRun, tokenizer: Any) -> list[str]:
    """Notes on the classes with other tokens in transformers."""
    texts = _prompts(run)
    tokens = zip(run.tokenizer(texts).tolist(), tokenizer(texts, truncation=True)["input_ids"], strict=True)
    same = [before[: len(after)] == after for before, after in tokens]
    differing = [name for name, equal in zip(run.classes, same, strict=True) if not equal]
    if not differing:
        return []
    return [f"transformers' tokenizer splits the prompts of these classes in other ways: {format_names(differing)}"]


def _preprocessing(run: TunedRun) -> dict[str, Any]:
    """Return the preprocessing of the images of a model of open_clip, with its defaults."""
    return {"resize_mode": "shortest", "interpolation": "bicubic"} | run.model.visual.preprocess_cfg


def _prompts(run: TunedRun) -> list[str]:
    """Prompt of each class by the first template."""
    return prompts(run.described.templates, run.classes)[0]
