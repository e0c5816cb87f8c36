"""The two towers of a CLIP, cut at the LSkip boundary: one file per family of models, and how to find it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .base import ImageTower, Memory, TextTower, UnsupportedModel
from .modes import evaluating, training_without_chance

__all__ = [
    "ImageTower",
    "Memory",
    "TextTower",
    "UnsupportedModel",
    "build_towers",
    "evaluating",
    "training_without_chance",
]


def build_towers(model: nn.Module, tokens: Tensor) -> tuple[ImageTower, TextTower]:
    """The image and text tower of a model, nothing skipped yet.

    Args:
        model: An open_clip `CLIP`, `CustomTextCLIP` or `CoCa`, an OpenAI `clip.model.CLIP`, or a Hugging Face
            `CLIPModel` or `SiglipModel`.
        tokens: [C, L] int64, the tokenised prompt of each class.

    Raises:
        UnsupportedModel: If no adapter handles the model, with the reason.
    """
    # By the names of modules: none of these packages is imported unless a model of its own is here.
    package = type(model).__module__.partition(".")[0]
    if package == "open_clip":
        return _open_clip(model, tokens)
    if package == "clip":
        from .openai import OpenAITextTower, openai_image_tower

        return openai_image_tower(model), OpenAITextTower(model, tokens)
    if package == "transformers":
        from .hugging_face import HuggingFaceImageTower, HuggingFaceTextTower

        return HuggingFaceImageTower(model), HuggingFaceTextTower(model, tokens)
    raise UnsupportedModel(
        "SkipCLIP: model must be a CLIP of open_clip, of OpenAI's clip or of Hugging Face's transformers; got "
        f"{type(model).__module__}.{type(model).__qualname__}. If it wraps one of these, pass what it wraps."
    )


def _open_clip(model: nn.Module, tokens: Tensor) -> tuple[ImageTower, TextTower]:
    from open_clip.hf_model import HFTextEncoder
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import TextTransformer, VisionTransformer

    from .coca import CoCaTextTower
    from .encoders import encoder_tower
    from .open_clip import MODELS, OpenClipImageTower, OpenClipTextTower
    from .staged import ResNetTower
    from .timm import timm_tower

    if not isinstance(model, MODELS):
        raise UnsupportedModel(
            "SkipCLIP: of open_clip's models CLIP, CustomTextCLIP and CoCa are handled; got "
            f"{type(model).__qualname__}."
        )
    visual, text = model.visual, getattr(model, "text", model)
    of_image: dict[type, Callable[..., ImageTower]] = {
        VisionTransformer: OpenClipImageTower,
        ModifiedResNet: ResNetTower,
        TimmModel: timm_tower,
    }
    with_class_token = getattr(text, "cls_emb", None) is not None
    of_text: dict[type, Callable[..., TextTower]] = {
        type(model): OpenClipTextTower,
        TextTransformer: CoCaTextTower if with_class_token else OpenClipTextTower,
        HFTextEncoder: encoder_tower,
    }
    for half, known, name in ((visual, [*of_image], "image"), (text, [*of_text], "text")):
        if type(half) not in known:
            raise UnsupportedModel(
                f"SkipCLIP: the {name} tower is a {type(half).__qualname__}; handled are "
                f"{', '.join(kind.__name__ for kind in known)}."
            )
    return of_image[type(visual)](model), of_text[type(text)](model, tokens)
