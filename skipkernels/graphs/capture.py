"""Capture of a function in a CUDA graph, and comparison of what the graph takes as constant."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..clip import SkipCLIP
from ..optimizer import FusedSGD
from ..towers.alterations import global_hooks
from .checks import has_any_hooks

Result = TypeVar("Result")

# Graphs of failed captures, one for each that a warning names. The allocators of PyTorch, of the device and of pinned
# memory, ask the graph of a capture whether a stream is in it. That of pinned memory still does after an end that
# raised: without the list its next allocation would read a freed graph.
_failed: list[Any] = []


def capture_graph(run: Callable[[], Result], stream: Any) -> tuple[Any, Result]:
    """Capture a function on a stream; return the graph and the static results.

    Without garbage collection: a collected tensor of another graph would be freed during the capture.
    """
    graph, pool, current = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # The outer context restores the stream, which torch.cuda.graph does not do after an error in torch 2.10: later
        # steps would run on the stream of the capture.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            return graph, run()
    except BaseException:
        # Before torch 2.12 the allocator of the device remains in the capture, and memory that several streams used is
        # never freed: eager steps would fill the device.
        with contextlib.suppress(RuntimeError):  # it is in no capture
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        _failed.append(graph)
        raise
    finally:
        if collects:
            gc.enable()


def renew_accumulators(parameters: Iterable[Tensor]) -> None:
    """Let autograd create new nodes for the gradients of parameters, so that a capture can be on another stream.

    A node accumulates on the stream on which it was created, and a loss that is still held keeps the nodes of its step
    alive: backward would accumulate on the stream of that step, which breaks a capture on another one. A parameter has
    a new node after its data had another dtype; its hooks stay.
    """
    for parameter in parameters:
        data = parameter.data
        parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
        parameter.data = data


# ---- constants of a graph --------------------------------------------------------------------------------------------


class GraphConstants:
    """Comparison of what a graph takes as constant: modules, modes, hooks, tensors and their addresses, options."""

    def __init__(self, clip: SkipCLIP, optimizer: torch.optim.Optimizer):
        self._clip, self._optimizer = clip, optimizer
        self._modules = list(clip.model.modules())
        self._captured = self._read()
        self._held = list(self._tensors()), clip.texts  # so that addresses are not used again

    def is_unchanged(self) -> bool:
        """Return True if a replay is the step that would run now."""
        return self._read() == self._captured

    def _tensors(self) -> Iterator[Tensor | None]:
        """Yield the tensors of clip and optimizer that a step reads and that exist between steps."""
        clip = self._clip
        for module in self._modules:
            yield from module._parameters.values()
            yield from module._buffers.values()
        for state in self._optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))
        yield from (*clip.texts.step_tensors(), clip.class_weight)

    def _read(self) -> list[list[Any]]:
        clip = self._clip
        return [
            [None if x is None else (id(x), x.data_ptr(), x.requires_grad) for x in self._tensors()],
            [(id(m), m.training, has_any_hooks(m), *map(id, m._modules.values())) for m in self._modules],
            [id(clip.texts), clip.images.tower.cut, clip.texts.tower.cut, clip.label_smoothing, global_hooks()],
            [_constant_options(self._optimizer, group) for group in self._optimizer.param_groups],
        ]


def _constant_options(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[Any]:
    """Options of a group that a graph takes as constant: numbers not read on the device, and ids of tensors."""
    read_on_the_device = {"lr", "momentum", "weight_decay"} if isinstance(optimizer, FusedSGD) else set()
    # Without momentum FusedSGD has no buffers: another graph.
    options: list[Any] = [list(map(id, group["params"])), group.get("momentum") == 0]
    for name, value in group.items():
        if isinstance(value, Tensor):
            options.append((name, id(value)))
        elif name not in {"params", "initial_lr", *read_on_the_device}:
            options.append((name, value))
    return options
