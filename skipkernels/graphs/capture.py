"""Capture of a function in a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# Graphs of failed captures, one for each that a warning names. The allocators of PyTorch, of the device and of pinned
# memory, ask the graph of a capture whether a stream is in it. That of pinned memory still does after an end that
# raised: without the list its next allocation would read a freed graph.
_failed: list[Any] = []


def record(run: Callable[[], Result], stream: Any) -> tuple[Any, Result]:
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
