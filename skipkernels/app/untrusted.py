"""Reading of files that others may have written: JSON, and the models, files and data that they may name.

open_clip and transformers read the other files of a folder themselves, with `trust_remote_code=False` and
`weights_only=True`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..formatting import first_line
from .data.base import InputError
from .data.registry import is_remote

OPEN_CLIP = "open_clip_config.json"
_ELSEWHERE = re.compile(r"^(hf-hub|hf|local-dir):|://|^[/\\~]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)")
_NAME = re.compile(r"[\w.+-]*")
_REPOSITORY = re.compile(r"(?:\w[\w.-]*/)?\w[\w.-]*")

Parsed = TypeVar("Parsed")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON or not an object; the message has one line.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # the latter if it is deeply nested
        raise ValueError(f"not JSON ({first_line(error)})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def validated(kind: type[Parsed], values: Any) -> Parsed:
    """Convert the values of a file to a class by pydantic.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Cost:
        ...     seconds: float
        >>> validated(Cost, {"seconds": "long"})
        Traceback (most recent call last):
        ValueError: seconds: Input should be a valid number, unable to parse string as a number
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or kind.__name__
        raise ValueError(f"{where}: {first['msg']}") from None


def check_source(where: object, name: str, value: str, trust: bool) -> None:
    """Refuse a source that the file `where` names if it is remote or elsewhere on this machine, unless with `trust`.

    "data" may name images on this machine: they are only decoded.

    >>> check_source("config.yaml", "model", "ViT-B-32", trust=False)
    >>> check_source("config.yaml", "model", "hf-hub:org/name", trust=True)
    """
    refused = is_remote(value) if name == "data" else _ELSEWHERE.search(value)
    if refused and not trust:
        raise _refused_source(where, name, value)


def _refused_source(where: object, name: str, value: str) -> InputError:
    return InputError(
        f"{where}: {name} must not be remote or elsewhere on this machine where only a file names it; got {value!r}. "
        "If you trust the author of the file, add `trust=True`."
    )


def read_open_clip_config(path: Path, *, repository: str | None = None, trust: bool = False) -> dict[str, Any]:
    """Return the model_cfg of an open_clip_config.json; each text in it is a plain name, unless with `trust`.

    Texts that may name a tower of the hub, or a file, are accepted if a configuration of open_clip itself has them.
    `repository` is the ORG/NAME of a model of the hub; None for a model in a folder.

    Raises:
        OSError, ValueError: If it is not such a file.
        InputError: If a text in it is refused.
    """
    model = read_object(path).get("model_cfg")
    if not isinstance(model, dict) or not all(isinstance(model.get(part), dict) for part in ("vision_cfg", "text_cfg")):
        raise ValueError("model_cfg must be a mapping with vision_cfg and text_cfg")
    for place, text in () if trust else _texts(model):
        if not _is_plain(place, text, repository) and (place[-1], text) not in _texts_of_open_clip():
            raise _refused_source(path, ".".join(place), text)
    return model


def _is_plain(place: tuple[str, ...], text: str, repository: str | None) -> bool:
    """Return True if a text names nothing that open_clip would load from elsewhere."""
    if len(place) > 2 or place[-1] == "hf_model_name":  # keyword arguments may name a file: tokenizer_kwargs.bpe_path
        return False
    if place[-1] != "hf_tokenizer_name":
        return _NAME.fullmatch(text) is not None
    if repository is None:  # open_clip reads the tokenizer from the folder, whatever its name
        return _REPOSITORY.fullmatch(text) is not None
    return text == repository


def _texts(values: Mapping[str, Any], *place: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each text in nested mappings and lists, with the names that lead to it."""
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, dict):
                yield from _texts(one, *place, name)
            elif isinstance(one, str):
                yield (*place, name), one


@cache
def _texts_of_open_clip() -> set[tuple[str, str]]:
    """Texts in the configurations of open_clip itself, each with its name."""
    import open_clip

    configs = [open_clip.get_model_config(name) for name in open_clip.list_models()]
    return {(place[-1], text) for config in configs for place, text in _texts(config)}
