"""Batches of features, read ahead of training into reused buffers."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..store import Store
from .samplers import BatchSampler

Pair = tuple[Tensor, Tensor]


class MemoryRows:
    """Rows [n, *shape] in a tensor, `rows`, with the interface of a `Store`."""

    def __init__(self, rows: Tensor):
        self.rows, self.shape, self.dtype, self.device = rows, tuple(rows.shape[1:]), rows.dtype, rows.device

    def expect(self, index: Tensor) -> None:
        """Do nothing: the rows are in memory."""

    def gather(self, index: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Gather rows by number [B], into `out` [B, *shape] if given."""
        rows = self.rows.index_select(0, index.to(self.device))
        return rows if out is None else out.copy_(rows)


Rows = Store | MemoryRows


class FeatureLoader:
    """Iterable over the batches of an epoch: (features [B, …], labels [B] int64).

    Created by `FeatureCache.loader`. Batches can be stored: a buffer is reused only when no tensor refers to it.

    Attributes:
        seconds_waited: Seconds that iterations have waited for batches.
    """

    def __init__(
        self,
        rows_of_epoch: Callable[[int], tuple[Rows, int]],
        labels: Tensor,
        sampler: Iterable[list[int]],
        *,
        dtype: torch.dtype | None,
        device: torch.device | None,
        prefetch: int,
    ):
        self.sampler, self.prefetch, self.dtype, self.device = sampler, prefetch, dtype, device
        self.seconds_waited = 0.0
        self._rows_of_epoch, self._labels = rows_of_epoch, labels
        self._epoch = 0  # for samplers that do not count epochs
        self._initial: dict[str, Any] | None = None  # the sampler's state at the beginning of the current epoch
        self._yielded = 0  # batches of the current epoch
        self._free: list[np.ndarray] = []  # buffers without a tensor

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        if self._initial and "epoch" in self._initial:  # the sampler may be ahead
            return self._initial["epoch"]
        return getattr(self.sampler, "epoch", self._epoch)

    def __iter__(self) -> Iterator[Pair]:
        """Iterate over the batches of an epoch; after a state was loaded, over the rest of its epoch."""
        if self._initial is not None and isinstance(self.sampler, BatchSampler):
            self.sampler.abandon()  # an epoch that was not finished
        self._initial, self._yielded = self._sampler_state(), 0
        rows, offset = self._rows_of_epoch(self.epoch)
        batches = self._to_device(self._read_all(rows, offset))
        if self.prefetch > 0:
            batches = _ahead(batches, self.prefetch)
        try:
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                self.seconds_waited += time.perf_counter() - started
                if batch is None:
                    break
                self._yielded += 1
                features, labels, ready = batch
                if ready is not None:  # copied on another stream
                    stream = torch.cuda.current_stream(features.device)
                    stream.wait_event(ready)
                    features.record_stream(stream)
                    labels.record_stream(stream)
                yield features, labels
        finally:
            batches.close()
        self._epoch, self._initial, self._yielded = self._epoch + 1, None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch; after loading it, the next iteration yields the remaining batches."""
        state = self._sampler_state() if self._initial is None else self._initial
        if "batches" not in state:
            raise TypeError(
                "FeatureLoader.state_dict: this sampler has no state_dict; name a sampler in FeatureCache.loader."
            )
        return state | {"batches": state["batches"] + self._yielded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state_dict`."""
        self.sampler.load_state_dict(state)  # type: ignore[attr-defined]
        self._initial, self._yielded = None, 0

    def _sampler_state(self) -> dict[str, Any]:
        return self.sampler.state_dict() if hasattr(self.sampler, "state_dict") else {}

    def _read_all(self, rows: Rows, offset: int) -> Generator[Pair, None, None]:
        """Read the batches. With prefetch, each is announced while the one before it is read."""
        batches = map(self._checked, self.sampler)
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)
            if self.prefetch > 0 and following is not None:
                rows.expect(offset + following)
            dtype, out = self.dtype or rows.dtype, None
            if rows.device.type == "cpu":
                out = self._buffer((len(batch), *rows.shape), dtype)
            features = rows.gather(offset + batch, out=out).to(dtype)
            yield features, self._labels[batch].to(rows.device)
            del features, out  # frees the buffer for the next batch, unless the caller keeps it
            batch = following

    def _checked(self, numbers: list[int]) -> Tensor:
        if any(not 0 <= number < len(self._labels) for number in numbers):
            raise IndexError(f"FeatureLoader: images are numbered from 0 to {len(self._labels) - 1}; got {numbers}.")
        return torch.as_tensor(numbers, dtype=torch.int64)

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Tensor in memory that is used again when the last tensor on it has been freed."""
        if self.device is not None and self.device.type == "cuda":
            return torch.empty(shape, dtype=dtype, pin_memory=True)  # PyTorch reuses it after the copy to the GPU
        size = math.prod(shape) * dtype.itemsize
        memory = None
        while memory is None or memory.nbytes < size:  # smaller memory is dropped: that of a short last batch
            try:
                memory = self._free.pop()  # atomic: another thread may take and return memory
            except IndexError:
                memory = np.empty(max(size, 1), dtype=np.uint8)
        part = memory[:size]
        weakref.finalize(part, self._free.append, memory)
        return torch.from_numpy(part).view(dtype).view(shape)

    def _to_device(self, batches: Iterator[Pair]) -> Generator[tuple[Tensor, Tensor, Any], None, None]:
        """Move batches to the device; on a GPU, yield also the event at the end of the copy."""
        if self.device is None or self.device.type != "cuda":
            for features, labels in batches:
                if self.device is not None:
                    features, labels = features.to(self.device), labels.to(self.device)
                yield features, labels, None
            return
        stream = torch.cuda.Stream(self.device)
        for features, labels in batches:
            if features.is_cuda:  # gathered on the current stream
                stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                moved = [part.to(self.device, non_blocking=True) for part in (features, labels)]
            yield moved[0], moved[1], stream.record_event()


def _ahead(batches: Iterator[Any], depth: int) -> Generator[Any, None, None]:
    """Yield batches of which a thread reads up to `depth` ahead."""
    thread = ThreadPoolExecutor(1, "skipkernels features")
    waiting = deque(thread.submit(next, batches, None) for _ in range(depth))
    try:
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, batches, None))
            yield batch
            del batch  # so that its buffer can be reused
    finally:
        thread.shutdown(cancel_futures=True)
