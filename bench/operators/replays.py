"""Times of the implementations of a case on a GPU, as CUDA graphs in turn.

A graph has up to CALLS calls, since the time between two events is several microseconds longer than one small kernel.
Its calls have different inputs, or more bytes of them than twice the L2 cache, which is flushed before each replay: no
call finds its inputs there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from skipkernels.formatting import first_line

from .. import measure
from . import Case, Run

CALLS, GRAPH_SECONDS = 20, 0.01  # of a graph: at most
ROUNDS, CASE_SECONDS = 50, 0.2  # of each implementation: at most, but at least FEWEST rounds
FEWEST = 5
Times = dict[str, list[float] | str]


def time_replays(case: Case, names: Sequence[str], device: torch.device) -> Times:
    """Seconds of a call of each implementation in each round, or the reason why it cannot be captured."""
    cache = torch.empty(2 * l2_bytes(device), dtype=torch.uint8, device=device)
    runs = runs_of(case, names, least_bytes=len(cache))
    slowest = max((measure.seconds_of(run, device) for run, *_ in runs.values()), default=GRAPH_SECONDS)
    calls = min(CALLS, max(1, int(GRAPH_SECONDS / slowest)))
    rounds = min(ROUNDS, max(FEWEST, int(CASE_SECONDS / (calls * slowest))))
    replays: dict[str, Callable[[], None]] = {}
    failed: dict[str, str] = {}
    for name, of in runs.items():
        try:
            replays[name] = captured(of, calls, device)
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            failed[name] = f"no CUDA graph: {first_line(error)}"
    times = measure.time_alternately(replays, rounds, device, before=cache.zero_)
    return {**failed, **{name: [each / calls for each in seconds] for name, seconds in times.items()}}


def runs_of(case: Case, names: Sequence[str], least_bytes: int) -> dict[str, list[Run]]:
    """The runs of each implementation, with inputs of their own: CALLS, or as many as have `least_bytes`."""
    count = min(CALLS, -(-least_bytes // case.work.moved))
    copies = [case.copy() for _ in range(count - 1)] if case.copy else []
    runs = {name: [case.runs[name], *(copy[name] for copy in copies)] for name in names}
    for first, *_ in runs.values():
        first()  # an in-place operator copies its inputs in the first call
    return runs


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def captured(runs: Sequence[Run], calls: int, device: torch.device) -> Callable[[], None]:
    """The replay of a CUDA graph of `calls` calls, of each run in turn."""
    stream = torch.cuda.Stream(device)  # backward must be captured on the stream of its warm-up
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in itertools.islice(itertools.cycle(runs), calls):
            run()
    return graph.replay
