"""Copies of fp32 weights in 16 bits, which fused blocks multiply by under autocast and `FusedSGD` updates.

Without them, each step casts the weights again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Cast:
    """The copy of a weight, and the version and address that the weight had when they were equal."""

    def __init__(self) -> None:
        self.product: list[int] = []  # ids of the weights of a product, which this one is part of
        self.joined: Tensor | None = None  # copies of them, one below the other
        self.own: Tensor | None = None  # the rows of this weight
        self.seen: tuple[int, int] | None = None


_kept = WeakTensorKeyDictionary()  # by weight


def keep(weights: Iterable[Tensor]) -> None:
    """Keep the copies of these weights from their next use on; other dtypes than fp32 are not copied."""
    for weight in weights:
        if weight.dtype == torch.float32 and weight not in _kept:
            _kept[weight] = _Cast()


def forget(weights: Iterable[Tensor]) -> None:
    """Keep no copies of these weights any more."""
    for weight in weights:
        _kept.pop(weight, None)


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return the tensor for the copies of the weights [n, …] of a product, one below the other.

    It is the same at each call; `own` tells which of them must be copied to it. None if they are not kept, or if one is
    part of another product.
    """
    casts = [_kept.get(weight) for weight in weights]
    if None in casts:
        return None
    found, product = casts[0].joined, list(map(id, weights))
    if found is None or found.dtype != dtype or found.device != weights[0].device:
        lengths = [len(weight) for weight in weights]
        with torch.inference_mode(False):  # else a later step could not write it
            found = weights[0].new_empty(sum(lengths), *weights[0].shape[1:], dtype=dtype)
        for cast, own in zip(casts, found.split(lengths), strict=True):
            cast.product, cast.joined, cast.own, cast.seen = product, found, own, None
    return found if all(cast.product == product for cast in casts) else None


def own(weight: Tensor) -> Tensor | None:
    """Return the copy of a weight if it is up to date."""
    cast = _kept.get(weight)
    return cast.own if cast is not None and cast.own is not None and cast.seen == _state(weight) else None


def to_update(weights: Iterable[Tensor]) -> list[Tensor | None]:
    """Return the copies that are up to date and that an update of the weights can write: all in one dtype."""
    found = [own(weight) if weight.is_contiguous() else None for weight in weights]
    dtype = next((x.dtype for x in found if x is not None), None)
    return [x if x is not None and x.dtype == dtype else None for x in found]


def mark(weights: Iterable[Tensor]) -> None:
    """Mark the copies of these weights, those that are kept, as up to date."""
    for weight in weights:
        cast = _kept.get(weight)
        if cast is not None and cast.own is not None:
            cast.seen = _state(weight)


def renew(weights: Iterable[Tensor]) -> None:
    """Copy those weights again that something else has changed."""
    stale = [
        weight for weight in weights if (cast := _kept.get(weight)) and cast.own is not None and own(weight) is None
    ]
    if stale:
        with torch.no_grad():
            torch._foreach_copy_([_kept[weight].own for weight in stale], stale)
        mark(stale)


def _state(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()
