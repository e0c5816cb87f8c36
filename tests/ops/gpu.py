"""Helpers of the tests on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def check_replays(step: Callable[..., list[Tensor]], inputs: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """`step`, captured with some inputs and replayed with others, gives what it gives for these."""
    stream = torch.cuda.Stream()  # a backward pass can only be captured on the stream that it was warmed up on
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
    """A device that is not the current one; the test is skipped where there is one only."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    return torch.device("cuda", 1)
