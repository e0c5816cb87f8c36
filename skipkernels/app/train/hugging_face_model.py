"""Loading of models of transformers, with image transform and tokenizer in open_clip's form."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from ..data import InputError
from ..untrusted import read_object

_TYPES = {"clip": "CLIPModel", "metaclip_2": "MetaClip2Model", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
_SMALL_FILES = ("*.json", "*.txt", "*.model")
_RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclass(frozen=True)
class HuggingFaceTokenizer:
    """Tokenizer of transformers in open_clip's form, with the image processor that is saved beside it."""

    tokenizer: Any
    processor: Any
    length: int

    def __call__(self, texts: list[str]) -> Tensor:
        """Return the tokens [n, length]."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        return self.tokenizer(texts, **options).input_ids

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the tokenizer and the image processor."""
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def load_hugging_face(name: str, where: str | Path, *, weights: bool) -> tuple[nn.Module, Callable, Callable]:
    """Load a model with its image transform and tokenizer, without code or adapters that are in the folder.

    `where` is a folder of `save_pretrained`, with the processor beside the model, or the name of a repository. Without
    `weights`, they are random.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError(f"{name} needs transformers: pip install 'skipkernels[hugging-face]'.", "model", "tune")
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    folder = where if isinstance(where, Path) else _downloaded(where, weights=weights)
    kind = read_object(folder / "config.json").get("model_type")
    if kind not in _TYPES:
        raise InputError(f"{name} must be a {', '.join(_TYPES.values())}; got {kind!r}.", "model", "tune")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{name} has an adapter of PEFT; save the model after merge_and_unload.", "model", "tune")
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    plain = {"attn_implementation": "sdpa", "trust_remote_code": False}  # a configuration may name a kernel of the hub
    config = AutoConfig.from_pretrained(folder, **safe)
    if weights:
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, **safe | plain)
    else:
        model = AutoModel.from_config(config, **plain)
    processor = AutoImageProcessor.from_pretrained(folder, **safe)
    model.preprocess_cfg = preprocess_settings(processor)
    tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    tokenize = HuggingFaceTokenizer(tokenizer, processor, config.text_config.max_position_embeddings)
    return model, image_transform_v2(PreprocessCfg(**model.preprocess_cfg), is_train=False), tokenize


def _downloaded(repository: str, *, weights: bool) -> Path:
    """Download a model of the hub; pickled weights only if there are no others."""
    from huggingface_hub import snapshot_download

    kinds = ("*.safetensors", "*.safetensors.index.json") if weights else ()
    folder = Path(snapshot_download(repository, allow_patterns=[*_SMALL_FILES, *kinds]))
    if weights and not any(folder.glob("*.safetensors")):
        snapshot_download(repository, allow_patterns=["pytorch_model*.bin", "pytorch_model*.bin.index.json"])
    return folder


def preprocess_settings(processor: Any) -> dict[str, Any]:
    """Convert the settings of an image processor of transformers to those of open_clip's `PreprocessCfg`.

    That of SigLIP 2 keeps the shape of an image; here all are resized to a square with as many patches.
    """
    if patches := getattr(processor, "max_num_patches", None):
        side = math.isqrt(patches) * processor.patch_size
        return _settings(processor, (side, side), "squash")
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
    return _settings(processor, sides, mode)


def _settings(processor: Any, sides: tuple[int, int], mode: str) -> dict[str, Any]:
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
