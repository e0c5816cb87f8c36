"""Measurements on a GPU only: kernel launches of a step, and its time as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from . import measure

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_WARM_UP, _REPLAYS = 3, 20


def launches_and_graph(step: Callable[[], Any]) -> dict[str, Any]:
    """Columns of a row: launches per call and milliseconds per replay, or the reason why there is none."""
    found: dict[str, Any] = {"launches": launches(step)}
    try:
        found["graph_ms"] = round(graph_milliseconds(step), 3)
    except RuntimeError as error:
        found["note"] = f"no CUDA graph: {str(error).splitlines()[0]}"
    return found


def launches(step: Callable[[], Any]) -> int:
    """Number of kernels that one call launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.key in _LAUNCHES)


def graph_milliseconds(step: Callable[[], Any]) -> float:
    """Capture a step and return the median time of its replays.

    Raises:
        RuntimeError: If it cannot be captured, for example because of a host sync.
    """
    replay = captured(step)
    device = torch.device("cuda", torch.cuda.current_device())
    return 1000 * measure.quantile([measure.seconds_of(replay, device) for _ in range(_REPLAYS)], 0.5)


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a step in a CUDA graph, after a warm-up, and return its replay.

    Raises:
        RuntimeError: If it cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


@contextlib.contextmanager
def sync_is_an_error() -> Iterator[None]:
    """Raise an error at a host sync."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
