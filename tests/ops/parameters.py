"""Parameters of tests: combinations in which each pair of values occurs, and their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def pairs(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """Each value of one parameter with each of another, in first × second cases instead of first × second × third."""
    assert len(third) <= min(len(first), len(second))
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def ids(shape: str, **names: Any) -> Callable[[Any], str]:
    """Names of values: a shape by its format, a dtype, others by `names`."""
    by_value = {repr(value): name for name, value in names.items()}

    def name_of(value: Any) -> str:
        if isinstance(value, torch.dtype):
            return str(value)[6:]
        if isinstance(value, tuple):
            return shape.format(*value) if "{" in shape else shape.join(map(str, value))
        return by_value.get(repr(value), str(value))

    return name_of
