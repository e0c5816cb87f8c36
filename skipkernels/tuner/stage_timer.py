"""Where the time of an epoch goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Budget:
    """Seconds by part. On a GPU they are the device's own, between events that are read at the end: nothing waits.

    Args:
        device: Where the parts run.

    Example:
        >>> budget = Budget(torch.device("cpu"))
        >>> with budget("forward"):
        ...     _ = torch.ones(2) + 1
        >>> list(budget.read()), budget.read()
        (['forward'], {})
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """What runs in this context is of that part."""
        started = self._mark()
        yield
        ended = self._mark()
        if self._device.type == "cuda":
            self._events.append((part, started, ended))
        else:
            self._seconds[part] += ended - started

    def add(self, part: str, seconds: float) -> None:
        """Time that someone else has measured."""
        self._seconds[part] += seconds

    def read(self) -> dict[str, float]:
        """Seconds by part since it was made or read; waits for the device."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for part, started, ended in self._events:
            self._seconds[part] += started.elapsed_time(ended) / 1000
        found = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return found

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
