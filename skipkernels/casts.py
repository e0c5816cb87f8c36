"""Casts of weights, copies in 16 bits, which a captured step multiplies by and its update writes.

`used` sets the casts of the step that runs, `of_product` gives them to the blocks, `of_weights` to the optimizer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)


class Casts:
    """The casts of a captured step, which are equal to the weights before each replay.

    An eager step before the capture makes them. Weights have one if they are contiguous, in fp32 and in one product.
    """

    def __init__(self, weights: Iterable[Tensor] = ()):
        self._weights = {id(x): x for x in weights if x.dtype == torch.float32 and x.is_contiguous()}
        self._products: dict[tuple[int, ...], Tensor] = {}  # by the ids of their weights
        self._casts: dict[int, Tensor] = {}  # by the id of the weight
        self._versions: dict[int, int] = {}  # of the weights after the last update that wrote the casts

    def of_product(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """Return the casts of the weights [n, …] of a product, one below the other; None if the step must cast them."""
        ids = tuple(map(id, weights))
        found = self._products.get(ids)
        if found is not None:
            return found if found.dtype == dtype else None
        new = self._weights.keys() >= set(ids) and self._casts.keys().isdisjoint(ids) and len(set(ids)) == len(ids)
        if not new or dtype not in _DTYPES:
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

    @contextlib.contextmanager
    def renewed(self) -> Iterator[None]:
        """Cast weights that have changed since the last update; the context updates weights and casts."""
        stale = [i for i in self._casts if self._versions.get(i) != self._weights[i]._version]
        if stale:
            self._copy(stale)
        yield
        self._versions = {i: self._weights[i]._version for i in self._casts}

    def _copy(self, ids: Sequence[int]) -> None:
        """Cast the weights with these ids."""
        with torch.no_grad():
            torch._foreach_copy_([self._casts[i] for i in ids], [self._weights[i] for i in ids])


# Of the step that runs. A global, since blocks are called through modules of the caller and the hooks of FusedSGD by
# autograd: no argument of ours reaches them, and a context variable is not set in the threads of autograd.
_active = Casts()
_one_step = threading.RLock()  # at a time, whatever the threads


@contextlib.contextmanager
def used(casts: Casts) -> Iterator[None]:
    """Use casts in this context, also in threads of autograd. Other threads wait before theirs."""
    global _active
    with _one_step:
        before, _active = _active, casts
        try:
            yield
        finally:
            _active = before


def of_product(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return what `Casts.of_product` does for the step that runs."""
    return _active.of_product(weights, dtype)


def of_weights(weights: Iterable[Tensor]) -> list[Tensor | None]:
    """Return what `Casts.of_weights` does for the step that runs."""
    return _active.of_weights(weights)
