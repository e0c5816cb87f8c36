"""The two towers of a CLIP, cut at the LSkip boundary: one file per family of models, and how to find it."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import ImageTower, Memory, TextTower, UnsupportedModel
from .modes import evaluating, training_without_chance
from .reductions import Reduction

__all__ = [
    "ImageTower",
    "Memory",
    "Reduction",
    "TextTower",
    "UnsupportedModel",
    "build_towers",
    "evaluating",
    "training_without_chance",
]

# Type of the caller's module → file here and what makes its tower. None of these is imported before it is needed: a
# model brings its own package, and an old timm is no obstacle to who has no model of timm.
_IMAGE = {
    "open_clip.transformer.VisionTransformer": "open_clip:OpenClipImageTower",
    "open_clip.timm_model.TimmModel": "timm:timm_tower",
    "open_clip.modified_resnet.ModifiedResNet": "convnets:ResNetTower",
    "clip.model.VisionTransformer": "openai:OpenAIImageTower",
    "clip.model.ModifiedResNet": "convnets:ResNetTower",
    "transformers.models.clip.modeling_clip.CLIPModel": "hugging_face:HuggingFaceImageTower",
    "transformers.models.siglip.modeling_siglip.SiglipModel": "hugging_face:HuggingFaceImageTower",
}
_TEXT = {
    "open_clip.model.CLIP": "open_clip:OpenClipTextTower",
    "open_clip.transformer.TextTransformer": "coca:text_tower",
    "open_clip.hf_model.HFTextEncoder": "hf_text:encoder_tower",
    "clip.model.CLIP": "openai:OpenAITextTower",
    "transformers.models.clip.modeling_clip.CLIPModel": "hugging_face:HuggingFaceTextTower",
    "transformers.models.siglip.modeling_siglip.SiglipModel": "hugging_face:HuggingFaceTextTower",
}
# The models, and where their halves are: an attribute, or the model itself.
_MODELS = {
    "open_clip.model.CLIP": ("visual", None),
    "open_clip.model.CustomTextCLIP": ("visual", "text"),
    "open_clip.coca_model.CoCa": ("visual", "text"),
    "clip.model.CLIP": ("visual", None),
    "transformers.models.clip.modeling_clip.CLIPModel": (None, None),
    "transformers.models.siglip.modeling_siglip.SiglipModel": (None, None),
}


def build_towers(model: nn.Module, tokens: Tensor) -> tuple[ImageTower, TextTower]:
    """The image and text tower of a model, nothing skipped yet.

    Args:
        model: An open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, an OpenAI `clip.model.CLIP`, or a Hugging Face
            `CLIPModel` or `SiglipModel`.
        tokens: [C, L] int64, the tokenised prompt of each class.

    Raises:
        UnsupportedModel: If no adapter handles the model, with the reason.
    """
    if _name(model) not in _MODELS:
        raise UnsupportedModel(
            f"SkipCLIP: model must be one of {', '.join(_MODELS)}; got {_name(model)}. "
            + (
                "A PeftModel redirects calls: put the adapters into the model itself, by peft.inject_adapter_in_model, "
                'and pass that with trainable="as_is".'
                if _name(model).startswith("peft.")
                else "A wrapper or a derived class may compute something else, so it is not taken for one of these."
            )
        )
    tokens = tokens.to(next(model.parameters()).device, torch.int64)
    visual, text = (model if part is None else getattr(model, part) for part in _MODELS[_name(model)])
    return _adapter(visual, _IMAGE, "image")(model), _adapter(text, _TEXT, "text")(model, tokens)


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _adapter(half: nn.Module, known: dict[str, str], tower: str) -> Callable[..., Any]:
    if _name(half) not in known:
        raise UnsupportedModel(f"SkipCLIP: the {tower} tower must be one of {', '.join(known)}; got {_name(half)}.")
    file, _, make = known[_name(half)].partition(":")
    if file in ("hugging_face", "hf_text"):  # whose blocks take other arguments in each major version
        version = importlib.metadata.version("transformers")
        if int(version.split(".")[0]) < 5:
            raise UnsupportedModel(
                f"SkipCLIP: {_name(half)} is handled with transformers 5 or later; got {version}. Update it: "
                "pip install 'skipkernels[hugging-face]'."
            )
    return getattr(importlib.import_module(f".families.{file}", __name__), make)
