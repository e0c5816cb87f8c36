"""Configurations of models and tokenizers from folders of unknown authors, rebuilt from plain fields.

No other field reaches open_clip or transformers, which would run code (`auto_map`), read files or download models that
a configuration names.
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from ...folders import link_or_copy, replace_text
from ..untrusted import read_object, read_regular, refused_source
from .errors import validated

OPEN_CLIP = "open_clip_config.json"
_MAX_BYTES = 1 << 28  # size of a file; the tokenizer.json of 256,000 tokens has 34 MB
_MODEL = ("embed_dim", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")
_NESTED = {
    "act_kwargs": ("approximate",),
    "hf_model_config": ("max_position_embeddings",),
    "norm_kwargs": ("eps",),
    "timm_model_kwargs": ("attn_pool_mlp_ratio", "depth", "embed_dim", "mlp_ratio", "num_heads", "patch_size")
    + ("pos_embed_grid_size", "swiglu_mlp"),
    "tokenizer_kwargs": ("clean", "strip_sep_token", "language", "reduction_mask"),
}
_CHECKED = ("timm_model_name", "hf_model_name")  # by `read_open_clip_config`
_NAME = re.compile(r"[\w.+-]*")
_REPOSITORY = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")

_TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_TOKENIZER_FILES: tuple[str, ...] = ("tokenizer.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
_TOKENIZER_FILES += ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_TOKENIZER = {f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "cls", "pad", "mask")}
_TOKENIZER |= {"add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder"}
_TOKENIZER |= {"additional_special_tokens", "extra_special_tokens", "clean_up_tokenization_spaces", "do_basic_tokenize"}
_TOKENIZER |= {"do_lower_case", "errors", "extra_ids", "legacy", "model_input_names", "model_max_length"}
_TOKENIZER |= {"padding_side", "truncation_side", "spaces_between_special_tokens", "src_lang", "tgt_lang"}
_TOKENIZER |= {"strip_accents", "tokenize_chinese_chars", "tokenizer_class", "trim_offsets", "backend"}
_PROCESSOR_CONFIGS = ("preprocessor_config.json", "processor_config.json")
_PROCESSOR = {f"do_{step}" for step in ("center_crop", "convert_rgb", "normalize", "rescale", "resize")}
_PROCESSOR |= {"crop_size", "image_mean", "image_std", "image_processor", "image_processor_type", "processor_class"}
_PROCESSOR |= {"feature_extractor_type", "max_num_patches", "patch_size", "resample", "rescale_factor", "size"}
SMALL_FILES = (*_TOKENIZER_CONFIGS, *_TOKENIZER_FILES, *_PROCESSOR_CONFIGS, "config.json")


_Size = Annotated[int, Field(ge=1, le=1 << 13)]  # pixels
_Sizes = _Size | Annotated[list[_Size], Field(min_length=2, max_length=2)]
_Mean = Annotated[float, Field(ge=-1e3, le=1e3)]  # of a channel with values from 0 to 1
_Std = Annotated[float, Field(ge=1e-3, le=1e3)]


class _Vision(TypedDict, total=False):
    """Fields of vision_cfg that open_clip does not check."""

    image_size: _Sizes


class _Preprocess(TypedDict, total=False):
    """Fields of preprocess_cfg that open_clip does not check."""

    size: _Sizes | None
    mean: Annotated[list[_Mean], Field(min_length=3, max_length=3)]
    std: Annotated[list[_Std], Field(min_length=3, max_length=3)]


def read_open_clip_config(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Read an open_clip_config.json: "model_cfg" and "preprocess_cfg", with plain values in known fields only.

    With `trust`, models of the hub are accepted as towers.
    """
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg

    towers = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
    values = read_object(path, _MAX_BYTES)
    model = _section(values, "model_cfg")
    rebuilt = {name: _plain(name, value) for name, value in model.items() if name not in towers}
    unknown = [name for name in rebuilt if name not in _MODEL]
    for name, kind in towers.items():
        if name in model:
            tower, known = _section(model, name), {field.name for field in dataclasses.fields(kind)}
            unknown += [f"{name}.{field}" for field in tower if field not in known]
            rebuilt[name] = {field: _plain(field, value) for field, value in tower.items() if field in known}
    if unknown:
        raise ValueError(f"model_cfg has the unknown field {unknown[0]}")
    image, text = rebuilt["vision_cfg"], rebuilt["text_cfg"]
    if not trust and not _NAME.fullmatch(image.get("timm_model_name") or ""):
        raise refused_source(path, "timm_model_name", image["timm_model_name"])
    if not trust and text.get("hf_model_name") and text["hf_model_name"] not in _text_towers():
        raise refused_source(path, "hf_model_name", text["hf_model_name"])
    validated(_Vision, image, strict=True)
    preprocess = validated(dict[str, Any], values.get("preprocess_cfg") or {})
    validated(_Preprocess, preprocess, strict=True)
    known = {field.name for field in dataclasses.fields(PreprocessCfg)}
    chosen = {name: _plain(name, value) for name, value in preprocess.items() if name in known}
    return {"model_cfg": rebuilt, "preprocess_cfg": chosen}


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(values.get(name), dict):
        raise ValueError(f"{name} must be a mapping")
    return values[name]


def _plain(name: str, value: Any) -> Any:
    """Return the value of a field if it is plain: a number, a name, or numbers; or a mapping of `_NESTED`."""
    if isinstance(value, dict) and name in _NESTED:
        return {key: _plain(key, part) for key, part in value.items() if key in _NESTED[name]}
    if isinstance(value, list) and all(isinstance(part, (int, float)) for part in value):
        return value
    if isinstance(value, str) and name not in _CHECKED:
        if not (_REPOSITORY if name == "hf_tokenizer_name" else _NAME).fullmatch(value):
            raise ValueError(f"{name} must be a name; got {value!r}")
    elif not isinstance(value, (int, float, str, type(None))):
        raise ValueError(f"{name} must be a plain value; got {type(value).__name__}")
    return value


@cache
def _text_towers() -> set[str | None]:
    """Text towers of transformers that open_clip's own configurations name."""
    import open_clip

    configs = map(open_clip.get_model_config, open_clip.list_models())
    return {config["text_cfg"].get("hf_model_name") for config in configs}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a Hugging Face tokenizer and image processor; configurations are rebuilt."""
    for names, allowed in ((_TOKENIZER_CONFIGS, _TOKENIZER), (_PROCESSOR_CONFIGS, _PROCESSOR)):
        for name in names:
            if (source / name).is_file():
                values = _allowed(read_object(source / name, _MAX_BYTES), allowed)
                replace_text(target / name, json.dumps(values, indent=2) + "\n")
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            (target / name).write_bytes(read_regular(source / name, _MAX_BYTES))


def _allowed(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    found = {name: value for name, value in values.items() if name in names}
    if isinstance(found.get("image_processor"), dict):
        found["image_processor"] = _allowed(found["image_processor"], names)
    return found


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a Hugging Face tokenizer, without the paths and code that it may name."""
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        copy_tokenizer(Path(temporary), folder)


def link_weights(source: Path, target: Path) -> None:
    """Link a file of weights, or those of a folder, into another folder; copy where links are not allowed."""
    for path in source.iterdir() if source.is_dir() else (source,):
        if path.name.endswith((".safetensors", ".bin", ".pth", ".safetensors.index.json", ".bin.index.json")):
            try:
                (target / path.name).symlink_to(path.absolute())
            except OSError:  # Windows, without a privilege
                link_or_copy(path.absolute(), target / path.name)
