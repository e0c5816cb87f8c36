"""Values that were read from a file, checked before they are used; an error names the first that is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_DEEPEST = 16  # levels of a plain value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_plain(value: Any, levels: int = _DEEPEST) -> bool:
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


def check_types(values: Any, wanted: dict[str, Any], where: str = "") -> None:
    """Refuse a mapping that lacks a name, or has a value of another kind there.

    Args:
        values: What was read.
        wanted: By name a key of `_KINDS`, several of which one has to fit, or such a mapping.
        where: The values, for the message.

    Raises:
        ValueError: Names the value and what it must be.

    Example:
        >>> check_types({"cost": {"seconds": "7"}}, {"cost": {"seconds": "number"}})
        Traceback (most recent call last):
        ValueError: cost.seconds must be number; got str
    """
    if type(values) is not dict:
        raise ValueError(f"{where} must be mapping; got {type(values).__name__}")
    for name, kinds in wanted.items():
        path = f"{where}.{name}" if where else name
        if name not in values:
            raise ValueError(f"{path} is missing")
        if isinstance(kinds, dict):
            check_types(values[name], kinds, path)
            continue
        options = [kinds] if isinstance(kinds, str) else kinds
        if not any(_KINDS[kind](values[name]) for kind in options):
            raise ValueError(f"{path} must be {' or '.join(options)}; got {type(values[name]).__name__}")


def check_like(value: Any, like: Any, where: str) -> None:
    """Refuse a value of another structure than `like`: keys, lengths, types, shapes and dtypes.

    Where `like` has None, a plain value or a list of row numbers is accepted.

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
    """Refuse the state of an optimizer of other weights.

    Args:
        state: What was read.
        like: Of the optimizer that is to go on.
        weights: That it updates, in order.

    Raises:
        ValueError: Names the first difference.
    """
    where = "trainer.optimizer"
    check_types(state, {"state": "mapping", "param_groups": "plain list"}, where)
    check_like(state["param_groups"], like["param_groups"], f"{where}.param_groups")
    for index, kept in state["state"].items():
        if type(index) is not int or not 0 <= index < len(weights) or type(kept) is not dict:
            raise ValueError(f"{where}.state must have mappings by numbers of weights below {len(weights)}")
        for name, value in kept.items():
            if type(name) is not str or not _fits(value, weights[index]):
                raise ValueError(f"{where}.state[{index}].{name} does not fit a weight of {_described(weights[index])}")


def _fits(value: Any, weight: Tensor) -> bool:
    """Whether an optimizer may keep a value for a weight: of its shape, or reduced over some dimensions."""
    if not isinstance(value, Tensor):
        return _is_plain(value)
    same = value.ndim == weight.ndim and all(n in (1, m) for n, m in zip(value.shape, weight.shape, strict=True))
    return value.is_floating_point() and (value.ndim == 0 or same)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
