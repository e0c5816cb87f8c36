"""Loading of `CLIPModel` and `SiglipModel` of transformers, with image transform and tokenizer in open_clip's form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from .errors import argument_error

_TYPES = ("clip", "siglip")
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


def is_hugging_face(folder: Path) -> bool:
    """Return True for a folder that `save_pretrained` of a model wrote."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def load_hugging_face(
    name: str, where: str, *, architecture_only: bool, seed: int
) -> tuple[nn.Module, Callable, Callable]:
    """Load a model with its image transform and tokenizer.

    Args:
        name: Name of the model, for messages.
        where: A folder of `save_pretrained`, with the processor beside the model; or the name of a repository.
        architecture_only: Load no weights.
        seed: Seed of the weights if none are loaded.

    Raises:
        InputError: If a part is missing or damaged, or it is another model.
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
    except ImportError as error:
        raise argument_error(
            "model", f"{name} needs transformers: pip install 'skipkernels[hugging-face]' ({error})."
        ) from error
    try:
        config = AutoConfig.from_pretrained(where)
        if config.model_type not in _TYPES:
            raise argument_error("model", f"{name} must be a CLIPModel or SiglipModel; got {config.model_type!r}.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if architecture_only:
                model = AutoModel.from_config(config)
            else:
                model = AutoModel.from_pretrained(where, dtype=torch.float32)
        settings = preprocess_settings(AutoImageProcessor.from_pretrained(where))
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError, AttributeError) as error:
        if getattr(error, "argument", None):
            raise
        reason = " ".join(str(error).split())[:250]
        raise argument_error(
            "model",
            f"{name} could not be loaded by transformers: {reason}. Save the model and its processor there with "
            "save_pretrained.",
        ) from error
    model.preprocess_cfg = settings
    length = config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> Tensor:
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return found.input_ids

    return model, image_transform_v2(PreprocessCfg(**settings), is_train=False), tokenize


def preprocess_settings(processor: Any) -> dict[str, Any]:
    """Convert the settings of an image processor of transformers to those of open_clip's `PreprocessCfg`.

    Raises:
        ValueError: If open_clip has no such preprocessing.
    """
    size = dict(processor.size.items() if hasattr(processor.size, "items") else vars(processor.size))
    size = {name: value for name, value in size.items() if value is not None}
    if getattr(processor, "do_center_crop", False):
        crop = processor.crop_size
        sides = (crop["height"], crop["width"])
        mode, resized = "shortest", size.get("shortest_edge")
        if resized is None or sides != (resized, resized):
            raise ValueError(f"its processor resizes to {size} and crops to {sides}, which differ")
    else:
        sides, mode = (size.get("height"), size.get("width")), "squash"
        if None in sides:
            raise ValueError(f"its processor resizes to {size}, without a crop")
    interpolation = _RESAMPLING.get(int(processor.resample))
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"its processor resizes with filter {processor.resample}")
    return {
        "size": sides,
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        "interpolation": interpolation,
        "resize_mode": mode,
    }
