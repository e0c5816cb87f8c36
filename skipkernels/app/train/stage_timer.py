"""Timing of the stages of an epoch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageTimer:
    """Timer of stages, in seconds. On a GPU it uses events of the stream; only `read` has a host sync.

    Example:
        >>> timer = StageTimer(torch.device("cpu"))
        >>> with timer("forward"):
        ...     _ = torch.ones(2) + 1
        >>> list(timer.read()), timer.read()
        (['forward'], {})
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the body of a `with` statement as part of a stage."""
        started = self._mark()
        yield
        ended = self._mark()
        if self._device.type == "cuda":
            self._events.append((stage, started, ended))
        else:
            self._seconds[stage] += ended - started

    def read(self) -> dict[str, float]:
        """Return the seconds by stage since the last read. On a GPU this is a host sync."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for stage, started, ended in self._events:
            self._seconds[stage] += started.elapsed_time(ended) / 1000
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
