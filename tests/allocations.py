"""Memory that operators allocate in a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _AllocatedBytes(TorchDispatchMode):
    """Count the storages that operators make; `peak` is the most bytes that were alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}
        self._sum = 0  # of them, and of those that were freed since it exceeded the peak

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operator(*args, **kwargs or {})
        if not operator.is_view:
            for storage in (tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, Tensor)):
                reference, size = StorageWeakRef(storage), storage.nbytes()
                self._sum += size - self._alive.get(reference, 0)
                self._alive[reference] = size
        if self._sum > self.peak:
            self._alive = {storage: size for storage, size in self._alive.items() if not storage.expired()}
            self._sum = sum(self._alive.values())
            self.peak = max(self.peak, self._sum)
        return out


def allocated_bytes(function: Callable[[], Any]) -> int:
    """Return the peak bytes of tensors that operators make in one call; exact, unlike resident memory.

    Tensors that an operator changes in place count as well, and its temporary memory does not.
    """
    with _AllocatedBytes() as allocated:
        function()
    return allocated.peak
