"""Casts of weights: copies in 16 bits, which a captured step multiplies by and its update writes.

Fused blocks find the casts of the step that runs by their weights (`active_joint_cast`), and so does FusedSGD
(`active_casts`): no argument passes through the modules of the caller to the blocks, nor through autograd to the hooks
of the optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)


class Casts:
    """Casts of weights, made when a step first asks for them. Weights have one if they are contiguous and in fp32."""

    def __init__(self, weights: Iterable[Tensor]):
        self._weights = {id(x): x for x in weights if x.dtype == torch.float32 and x.is_contiguous()}
        self._joint: dict[tuple[int, ...], Tensor] = {}  # by the ids of their weights
        self._casts: dict[int, Tensor] = {}  # by the id of the weight: parts of the joint ones
        self._versions: dict[int, int] = {}  # of the weights after the last step

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let a step find these casts, and update them with the weights; first copy weights that others changed."""
        self._copy([i for i in self._casts if self._versions.get(i) != self._weights[i]._version])
        _active.update(dict.fromkeys(self._weights, self))
        try:
            yield
        finally:
            for i in self._weights:
                _active.pop(i, None)
        self._versions = {i: self._weights[i]._version for i in self._casts}

    def joint_cast(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """Return the casts of the weights [n, …] of a product, one below the other; None if the step must cast them."""
        ids = tuple(map(id, weights))
        joint = self._joint.get(ids)
        if joint is not None:
            return joint if joint.dtype == dtype else None
        if dtype not in _DTYPES or not self._may_join(ids):
            return None
        lengths = [len(weight) for weight in weights]
        joint = weights[0].new_empty(sum(lengths), *weights[0].shape[1:], dtype=dtype)
        self._joint[ids] = joint
        self._casts |= zip(ids, joint.split(lengths), strict=True)
        self._copy(ids)
        return joint

    def _may_join(self, ids: Sequence[int]) -> bool:
        """Return True for weights that are in no product, once each: the update writes one cast of a weight."""
        return self._weights.keys() >= set(ids) and self._casts.keys().isdisjoint(ids) and len(set(ids)) == len(ids)

    def cast_of(self, weight: Tensor) -> Tensor | None:
        """Return the cast of a weight, for its update; None if it has none."""
        return self._casts.get(id(weight))

    def _copy(self, ids: Sequence[int]) -> None:
        """Cast the weights with these ids."""
        if ids:
            with torch.no_grad():
                torch._foreach_copy_([self._casts[i] for i in ids], [self._weights[i] for i in ids])


# ---- casts of the steps that run -------------------------------------------------------------------------------------

_active: dict[int, Casts] = {}  # by the ids of their weights, of one or several models


def active_joint_cast(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return what `Casts.joint_cast` does, if a step runs that has casts of these weights."""
    casts = _active.get(id(weights[0]))
    return None if casts is None else casts.joint_cast(weights, dtype)


def active_casts(weights: Iterable[Tensor]) -> list[Tensor | None]:
    """Return the cast of each weight, for its update; None if it has none."""
    found = [(weight, _active.get(id(weight))) for weight in weights]
    return [None if casts is None else casts.cast_of(weight) for weight, casts in found]
