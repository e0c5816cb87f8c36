"""Helpers of the tests on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def check_replays(step: Callable[..., list[Tensor]], inputs: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Check that `step`, captured with `inputs` and replayed with `others`, returns the results for `others`."""
    stream = torch.cuda.Stream()  # backward must be captured on the stream of its warm-up
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*inputs)  # kernels are compiled before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step(*inputs)
    with torch.no_grad():
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, step(*inputs), strict=True))


def second_device() -> torch.device:
    """Return a device that is not current; skip the test if there is none."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    return torch.device("cuda", 1)
