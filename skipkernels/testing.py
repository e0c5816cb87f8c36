"""Tolerances and measurements that tests and benchmarks share.

The rule of the numerical tests is err(kernel) ≤ err(eager) + SLACK[dtype]: err is `relative_error` against the same
function in fp64, eager is plain PyTorch in the dtype. The slack is needed since eager's error may be 0 by chance.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .peak_memory import PeakMemory

CPU = torch.device("cpu")

SLACK = {
    # A few roundings in another order than eager's: a sum of D products in blocks, then the unit norm.
    torch.float64: 1e-14,
    # 16 steps of 2⁻²³: the order of the sums over D and K differs.
    torch.float32: 2e-6,
    # The result is rounded once: half a step of bf16 (2⁻⁹). Sums are fp32, eager's are not.
    torch.bfloat16: 2e-3,
    # The same: half a step of fp16 (2⁻¹²).
    torch.float16: 2.5e-4,
}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value − truth| / |truth| over finite elements, or |value| if the truth is 0; finite positions must be equal."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    assert torch.equal(value.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    difference, size = (value - truth)[finite].norm(), truth[finite].norm()
    return float(difference / size) if size > 0 else float(difference)


def gradients(model: torch.nn.Module, loss: Tensor, *, retain_graph: bool = False) -> dict[str, Tensor]:
    """Run `loss.backward()`; return the gradients of the parameters of a model by name, and leave it none."""
    loss.backward(retain_graph=retain_graph)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def saved_bytes(step: Callable[[], Any]) -> int:
    """Bytes that autograd saves for the backward of `step()`: each storage once, without parameters.

    By the identity of the storage: on the meta device all have the same address.
    """
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor._base if tensor._is_view() else tensor
        if not isinstance(base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
        return tensor.detach()  # a node that saves its own output unchanged would keep the graph alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep_alive = step()  # noqa: F841  the identity of a freed storage may be used again
    return sum(storages.values())


def gradient_bytes(loss: torch.Tensor) -> int:
    """Run `loss.backward()`; return the peak bytes of leaf gradients, each counted from its node until it is freed."""
    alive: dict[StorageWeakRef, int] = {}
    peak = 0

    def watch(node: torch.autograd.graph.Node) -> None:
        into_leaf = [hasattr(following, "variable") for following, _ in node.next_functions]

        def count(gradients: tuple[torch.Tensor | None, ...], _: Any) -> None:
            nonlocal peak
            for gradient, wanted in zip(gradients, into_leaf, strict=True):
                if gradient is not None and wanted:
                    storage = gradient.untyped_storage()
                    alive[StorageWeakRef(storage)] = storage.nbytes()
            peak = max(peak, sum(size for storage, size in alive.items() if not storage.expired()))

        node.register_hook(count)

    found: set[torch.autograd.graph.Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            watch(node)
            waiting += [following for following, _ in node.next_functions]
    del found, waiting, node  # they would keep tensors that backward frees
    loss.backward()
    return peak


def peak_bytes(function: Callable[[], Any], device: torch.device = CPU, *, warm_up: bool = True) -> int:
    """Peak memory of one call above the memory before it.

    Allocated memory on a GPU, else resident memory, which is measured on Linux only; elsewhere the result is 0.
    """
    if warm_up:
        function()  # memory that is allocated once and kept is not counted
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: Windows has no library None
        ctypes.CDLL(None).malloc_trim(0)  # glibc returns freed memory to the system
    if device.type == "cpu" and not Path("/proc/self/status").exists():
        return 0
    memory = PeakMemory(device)
    before = memory.read()
    function()
    return memory.read() - before
