"""Validation of values that were read from a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_MAX_DEPTH = 16  # levels of a plain value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_plain(value: Any, levels: int = _MAX_DEPTH) -> bool:
    if isinstance(value, (dict, list, tuple)):
        keys, parts = (value.keys(), value.values()) if isinstance(value, dict) else ((), value)
        named = all(type(key) is str for key in keys)
        return named and levels > 0 and all(_is_plain(part, levels - 1) for part in parts)
    return type(value) in (str, bool, type(None)) or _is_number(value)


_KINDS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "text": lambda value: type(value) is str,
    "number": _is_number,
    "whole number": lambda value: type(value) is int and value >= 0,
    "mapping": lambda value: type(value) is dict,
    "plain mapping": lambda value: type(value) is dict and _is_plain(value),
    "plain list": lambda value: type(value) is list and _is_plain(value),
    "numbers by name": lambda value: (
        type(value) is dict
        and all(type(key) is str and (part is None or _is_number(part)) for key, part in value.items())
    ),
}


def check_types(values: Any, kinds: dict[str, Any], where: str = "") -> None:
    """Check that a mapping has values of the expected kinds.

    Args:
        values: The mapping.
        kinds: Kind of each value by name: a key of `_KINDS`, a tuple of alternatives, or a mapping of kinds.
        where: Name of the mapping, for the message.

    Raises:
        ValueError: Names the first wrong value and the expected kind.

    Example:
        >>> check_types({"cost": {"seconds": "7"}}, {"cost": {"seconds": "number"}})
        Traceback (most recent call last):
        ValueError: cost.seconds must be number; got str
    """
    if type(values) is not dict:
        raise ValueError(f"{where} must be mapping; got {type(values).__name__}")
    for name, kind in kinds.items():
        path = f"{where}.{name}" if where else name
        if name not in values:
            raise ValueError(f"{path} is missing")
        if isinstance(kind, dict):
            check_types(values[name], kind, path)
            continue
        options = [kind] if isinstance(kind, str) else kind
        if not any(_KINDS[option](values[name]) for option in options):
            raise ValueError(f"{path} must be {' or '.join(options)}; got {type(values[name]).__name__}")


def check_like(value: Any, like: Any, where: str) -> None:
    """Check that a value has the structure of `like`: keys, lengths, types, shapes and dtypes.

    For None in `like`, any plain value or int64 vector is valid.

    Raises:
        ValueError: Names the first difference.

    Example:
        >>> check_like({"draws": torch.ones(2)}, {"draws": torch.zeros(3)}, "state")
        Traceback (most recent call last):
        ValueError: state.draws must be float32 [3]; got float32 [2]
    """
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor) or (value.dtype, value.shape) != (like.dtype, like.shape):
            raise ValueError(f"{where} must be {_described(like)}; got {_described(value)}")
    elif isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            raise ValueError(f"{where} must be a mapping of {', '.join(map(str, like)) or 'nothing'}")
        for name, part in like.items():
            check_like(value[name], part, f"{where}.{name}")
    elif isinstance(like, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(like):
            raise ValueError(f"{where} must have {len(like)} values")
        for number, (part, other) in enumerate(zip(value, like, strict=True)):
            check_like(part, other, f"{where}[{number}]")
    elif like is None:
        rows = isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.int64
        if not (rows or _is_plain(value)):
            raise ValueError(f"{where} must be null or a plain value; got {_described(value)}")
    elif not (_is_number(value) if type(like) in (int, float) else type(value) is type(like)):
        raise ValueError(f"{where} must be {type(like).__name__}; got {_described(value)}")


def check_optimizer(state: Any, like: dict[str, Any], weights: Sequence[Tensor]) -> None:
    """Check that the state of an optimizer fits the one that will load it, `like`, and its weights.

    Raises:
        ValueError: Names the first difference.
    """
    where = "trainer.optimizer"
    check_types(state, {"state": "mapping", "param_groups": "plain list"}, where)
    check_like(state["param_groups"], like["param_groups"], f"{where}.param_groups")
    for index, kept in state["state"].items():
        if type(index) is not int or not 0 <= index < len(weights) or type(kept) is not dict:
            raise ValueError(f"{where}.state must have mappings by index of a weight, below {len(weights)}")
        for name, value in kept.items():
            if type(name) is not str or not _fits(value, weights[index]):
                raise ValueError(f"{where}.state[{index}].{name} does not fit a weight of {_described(weights[index])}")


def _fits(value: Any, weight: Tensor) -> bool:
    """Return True for a plain value, or a float tensor that is a scalar or broadcasts to the weight."""
    if not isinstance(value, Tensor):
        return _is_plain(value)
    same = value.ndim == weight.ndim and all(n in (1, m) for n, m in zip(value.shape, weight.shape, strict=True))
    return value.is_floating_point() and (value.ndim == 0 or same)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
