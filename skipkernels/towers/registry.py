"""Build the two towers of a model, chosen by the types of its modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .base import UnsupportedModel
from .families import IMAGE_TOWERS, MODELS, TEXT_TOWERS, Entry, type_name
from .image import ImageTower
from .text import TextTower

# Type of the model → why it is not handled.
_NO_PAIR = "the model has no image and text tower to contrast"
_REFUSED = {
    "open_clip.clap_model.CLAP": f"it contrasts audio with text; {_NO_PAIR}",
    "open_clip.naflex_genlip_model.NaFlexGenLip": f"it generates captions; {_NO_PAIR}",
    "open_clip.naflex_genlap_model.NaFlexGenLap": f"it generates captions of audio; {_NO_PAIR}",
    "transformers.models.altclip.modeling_altclip.AltCLIPModel": (
        "its text encoder is an XLM-RoBERTa of its own; in an HFTextEncoder of open_clip that is handled"
    ),
    "transformers.models.chinese_clip.modeling_chinese_clip.ChineseCLIPModel": (
        "its text encoder is a BERT of its own; in an HFTextEncoder of open_clip that is handled"
    ),
    "transformers.models.clipseg.modeling_clipseg.CLIPSegModel": (
        "it is a CLIPModel on images of any size for a decoder of segments; load its CLIP as a CLIPModel"
    ),
}

# Package of a wrapper → what to do instead.
_WRAPPERS = {
    "peft.": (
        "A PeftModel redirects calls: put the adapters into the model itself, by peft.inject_adapter_in_model, and "
        'pass that with trainable="as_is".'
    ),
    "torch.nn.parallel.": (
        "Pass the model itself (.module), and wrap the SkipCLIP: DistributedDataParallel(clip, "
        "forward_sync_buffers=False)."
    ),
    "torch._dynamo.": "Pass the model that was compiled (._orig_mod): the step is not compiled by torch.compile.",
}


def build_towers(model: nn.Module) -> tuple[ImageTower, TextTower]:
    """Build the image tower and the text tower of a model, with no blocks skipped.

    Raises:
        UnsupportedModel: If no adapter handles the model, with the reason.
    """
    if not isinstance(model, nn.Module):
        remedy = " Pass its first element." if isinstance(model, tuple) else ""
        raise TypeError(f"SkipCLIP: model must be a CLIP, an nn.Module; got {type(model).__name__}.{remedy}")
    name = type_name(type(model))
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise UnsupportedModel(
            "SkipCLIP: parameters must be whole; got shards (fully_shard of FSDP2, or tensor parallelism). Create "
            "SkipCLIP first, then shard the blocks above the cut and the SkipCLIP: docs/many-processes.md."
        )
    if name in _REFUSED:
        raise UnsupportedModel(f"SkipCLIP: {name.rpartition('.')[2]} is not handled: {_REFUSED[name]}.")
    if name not in MODELS:
        remedy = "A wrapper or a derived class may compute something else, so it is not treated as one of these."
        remedy = next((text for package, text in _WRAPPERS.items() if name.startswith(package)), remedy)
        raise UnsupportedModel(f"SkipCLIP: model must be one of {', '.join(MODELS)}; got {name}. {remedy}")
    visual, text = (model if half is None else getattr(model, half) for half in MODELS[name])
    return _factory(visual, IMAGE_TOWERS, "image")(model), _factory(text, TEXT_TOWERS, "text")(model)


def _factory(half: nn.Module, towers: Mapping[str, Entry], tower: str) -> Callable[..., Any]:
    """Import the class or function that makes the tower of `half`."""
    name = type_name(type(half))
    if name not in towers:
        raise UnsupportedModel(f"SkipCLIP: the {tower} tower must be one of {', '.join(towers)}; got {name}.")
    if (reason := towers[name].why_unavailable()) is not None:
        raise UnsupportedModel(f"SkipCLIP: {name} {reason}")
    return towers[name].load()
