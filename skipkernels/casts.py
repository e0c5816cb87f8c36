"""Casts of weights, copies in 16 bits, which a captured step multiplies by and its update writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)


class Casts:
    """The casts of a captured step, which are equal to the weights before each replay.

    An eager step before the capture makes them. Weights have one if they are contiguous, in fp32 and in one product.

    Attributes:
        complete: No others are made, as in a capture.
    """

    def __init__(self, weights: Iterable[Tensor]):
        self.complete = False
        self._weights = {id(x): x for x in weights if x.dtype == torch.float32 and x.is_contiguous()}
        self._products: dict[tuple[int, ...], Tensor] = {}  # by the ids of their weights
        self._casts: dict[int, Tensor] = {}  # by the id of the weight
        self._versions: dict[int, int] = {}

    def of_product(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """Return the casts of the weights [n, …] of a product, one below the other; None if the step must cast them."""
        ids = tuple(map(id, weights))
        found = self._products.get(ids)
        if found is not None:
            return found if found.dtype == dtype else None
        new = self._weights.keys() >= set(ids) and self._casts.keys().isdisjoint(ids) and len(set(ids)) == len(ids)
        if self.complete or not new or dtype not in _DTYPES:
            return None
        lengths = [len(weight) for weight in weights]
        joint = weights[0].new_empty(sum(lengths), *weights[0].shape[1:], dtype=dtype)
        self._products[ids] = joint
        self._casts |= zip(ids, joint.split(lengths), strict=True)
        self._copy(ids)
        return joint

    def of_weights(self, weights: Iterable[Tensor]) -> list[Tensor | None]:
        """Return the cast of each weight, or None."""
        return [self._casts.get(id(weight)) for weight in weights]

    def renew(self) -> None:
        """Cast the weights that have changed since the last update by a replay."""
        stale = [i for i in self._casts if self._versions.get(i) != self._weights[i]._version]
        if stale:
            self._copy(stale)
            self.mark()

    def _copy(self, ids: Sequence[int]) -> None:
        """Cast the weights with these ids."""
        with torch.no_grad():
            torch._foreach_copy_([self._casts[i] for i in ids], [self._weights[i] for i in ids])

    def mark(self) -> None:
        """Mark all casts as up to date."""
        self._versions = {i: self._weights[i]._version for i in self._casts}


active: Casts | None = None  # of the step that runs: `prepare` of a block reads them, `FusedSGD` writes


@contextlib.contextmanager
def used(casts: Casts | None) -> Iterator[None]:
    """Use casts in this context, also in threads of autograd."""
    global active
    before, active = active, casts
    try:
        yield
    finally:
        active = before
