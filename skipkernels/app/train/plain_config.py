"""Check of an open_clip_config.json by an unknown author: it names no model, file or path elsewhere.

open_clip and transformers read the other files of a folder themselves, with `trust_remote_code=False` and
`weights_only=True`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..untrusted import read_object, refused_source

OPEN_CLIP = "open_clip_config.json"
_NAME = re.compile(r"[\w.+-]*")
_REPOSITORY = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")


def read_open_clip_config(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """Return the model_cfg of an open_clip_config.json; with `trust`, without the check.

    Raises:
        OSError, ValueError: If it is not such a file.
        InputError: If a text in it is not a plain name, or is an argument that may name a file.
    """
    model = read_object(path).get("model_cfg")
    if not isinstance(model, dict) or not all(isinstance(model.get(part), dict) for part in ("vision_cfg", "text_cfg")):
        raise ValueError("model_cfg must be a mapping with vision_cfg and text_cfg")
    for place, text in () if trust else _texts(model):
        if not _is_plain(place, text):
            raise refused_source(path, ".".join(place), text)
    return model


def _texts(values: Mapping[str, Any], *place: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each text in nested mappings and lists, with the names that lead to it."""
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                yield from _texts(one, *place, name)
            elif isinstance(one, str):
                yield (*place, name), one


def _is_plain(place: tuple[str, ...], text: str) -> bool:
    name = place[-1]
    if len(place) > 2:  # keyword arguments, such as tokenizer_kwargs.bpe_path
        return place[-2:] in _own_arguments() and _NAME.fullmatch(text) is not None
    if name == "hf_model_name":  # a tower of the hub, which transformers downloads
        return text in _own_towers()
    return (_REPOSITORY if name == "hf_tokenizer_name" else _NAME).fullmatch(text) is not None


@cache
def _own_arguments() -> set[tuple[str, ...]]:
    """Keyword arguments with texts in open_clip's own configurations."""
    return {place[-2:] for config in _own_configs() for place, _ in _texts(config) if len(place) > 2}


@cache
def _own_towers() -> set[str]:
    """Text towers of transformers in open_clip's own configurations."""
    return {text for config in _own_configs() for place, text in _texts(config) if place[-1] == "hf_model_name"}


@cache
def _own_configs() -> list[dict[str, Any]]:
    import open_clip

    return [open_clip.get_model_config(name) for name in open_clip.list_models()]
