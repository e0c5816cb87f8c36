"""Capture of a function in a CUDA graph."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# Graphs of failed captures: in some versions of PyTorch its allocators still refer to them.
_failed: list[Any] = []


def record(run: Callable[[], Result], stream: Any, pool: Any) -> tuple[Any, Result]:
    """Capture a function on a stream; return the graph and the static results.

    Without garbage collection: a collected tensor of another graph would be freed during the capture.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # The outer context restores the stream, which torch.cuda.graph does not do after an error in torch 2.10.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            return graph, run()
    except RuntimeError:
        # Before torch 2.12 the allocator remains in the capture, and frees nothing that several streams used.
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
