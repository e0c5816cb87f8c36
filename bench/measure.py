"""Times in turn, and the limits of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

CPU = torch.device("cpu")
OURS = "skipkernels"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_COPIED = 1 << 28  # bytes: larger than any cache
Key = TypeVar("Key")


def default_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_alternately(
    functions: dict[Key, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    *,
    warm_up: bool = True,
    calls: int = 1,
    before: Callable[[], Any] | None = None,
) -> dict[Key, list[float]]:
    """Seconds of each function in each round, run in turn, after a warm-up round unless all ran before.

    The order changes every round, since a later function finds shared inputs in the CPU cache. For `calls` and `before`
    see `seconds_of`.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for number in range(0 if warm_up else 1, rounds + 1):
        shuffle(order)
        for name in order:
            elapsed = seconds_of(functions[name], device, calls, before)
            if number:
                seconds[name].append(elapsed)
    return seconds


def seconds_of(
    function: Callable[[], Any], device: torch.device, calls: int = 1, before: Callable[[], Any] | None = None
) -> float:
    """Seconds of one of `calls` calls in a row: between two events on the current stream of a GPU, else by the clock.

    Events are recorded by the GPU: they leave out the time of the host sync, several microseconds. `before` is called
    first and not timed. While a GPU runs it, the host enqueues the calls, so that their launch is left out, too.
    """
    synchronize(device)
    if device.type != "cuda":
        if before is not None:
            before()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        if before is not None:
            before()
        first.record()
        for _ in range(calls):
            function()
        last.record()
        last.synchronize()
    return first.elapsed_time(last) / 1000 / calls


def compare(
    functions: dict[tuple[str, str], Callable[[], Any]], rounds: int, device: torch.device
) -> dict[tuple[str, str], dict[str, Any]]:
    """Columns of each implementation and precision, all of which have run before: times, and our speed-up."""
    seconds, columns = time_alternately(functions, rounds, device, warm_up=False), {}
    for (name, precision), times in seconds.items():
        columns[name, precision] = milliseconds(times) | {"rounds": rounds}
        if name != OURS and (OURS, precision) in seconds:
            columns[name, precision]["faster"] = round(median_ratio(times, seconds[OURS, precision]), 3)
    return columns


def floor(flops: float, dtype: torch.dtype, moved: float, device: torch.device) -> float:
    """Least seconds: of products at the rate of a large one, or of `moved` bytes at the rate of a copy, if longer."""
    return max(flops / matrix_rate(device, dtype) if flops else 0.0, moved / bandwidth(device))


@functools.cache
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product: the fastest of five."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(time_alternately({"product": lambda: left @ right}, 5, device)["product"])


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes/s of a large copy, both the bytes read and those written: the fastest of five."""
    return 2 * _COPIED / min(time_alternately({"copy": copying(2 * _COPIED, device)}, 5, device)["copy"])


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, as jemalloc and tcmalloc do; a no-op with another C library.

    Otherwise large results are returned to the system each time, and clearing pages takes half of a round.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: smaller allocations come from the heap
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: free bytes kept at the end of the heap


def copying(moved: int, device: torch.device = CPU) -> Callable[[], Any]:
    """A copy that reads and writes `moved` bytes in total, a bound for memory-bound operators."""
    source, target = (torch.zeros(max(moved // 2, 1), dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantile(values: list[float], q: float) -> float:
    """The q-quantile of a sample, by linear interpolation."""
    return torch.tensor(values, dtype=torch.float64).quantile(q).item()


def milliseconds(seconds: list[float], digits: int = 1) -> dict[str, float]:
    """Columns p20_ms, p50_ms and p80_ms of times in seconds."""
    return {f"p{q}_ms": round(1000 * quantile(seconds, q / 100), digits) for q in (20, 50, 80)}


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median ratio of times measured in the same rounds."""
    return quantile([above / below for above, below in zip(numerators, denominators, strict=True)], 0.5)
