"""Batches of features, read ahead of training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .samplers import BatchSampler
from .table import FeatureTable

Pair = tuple[Tensor, Tensor]


class FeatureLoader:
    """Iterable over the batches of an epoch: (features [B, …], labels [B] int64).

    Created by `FeatureCache.loader`.

    Attributes:
        seconds_waited: Seconds that iterations have waited for batches.
    """

    def __init__(
        self,
        load_epoch: Callable[[int], FeatureTable],
        labels: Tensor,
        sampler: Iterable[list[int]],
        *,
        dtype: torch.dtype | None,
        device: torch.device | None,
        prefetch: int,
    ):
        self.sampler, self.prefetch, self.dtype, self.device = sampler, prefetch, dtype, device
        self.seconds_waited = 0.0
        self._load_epoch, self._labels = load_epoch, labels
        self._epoch = 0  # for samplers that do not count epochs
        self._initial: dict[str, Any] | None = None  # the sampler's state at the beginning of the current epoch
        self._yielded = 0  # batches of the current epoch

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
        batches = self._to_device(self._read_all(self._load_epoch(self.epoch)))
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

    def _read_all(self, table: FeatureTable) -> Generator[Pair, None, None]:
        """Read the batches."""
        for numbers in self.sampler:
            if any(not 0 <= number < len(self._labels) for number in numbers):
                raise IndexError(
                    f"FeatureLoader: images are numbered from 0 to {len(self._labels) - 1}; got {numbers}."
                )
            ids = torch.as_tensor(numbers, dtype=torch.int64)
            features = table.rows(ids)
            yield features.to(self.dtype or features.dtype), self._labels[ids].to(features.device)
            del features  # the caller alone decides how long it lives

    def _to_device(self, batches: Iterator[Pair]) -> Generator[tuple[Tensor, Tensor, Any], None, None]:
        """Move batches to the device; on a GPU, yield also the event at the end of the copy."""
        if self.device is None or self.device.type != "cuda":
            for features, labels in batches:
                if self.device is not None:
                    features, labels = features.to(self.device), labels.to(self.device)
                yield features, labels, None
            return
        stream = torch.cuda.Stream(self.device)
        for pair in batches:
            if pair[0].is_cuda:  # gathered on the current stream
                stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                # PyTorch reuses pinned memory after the copy to the GPU.
                pinned = (part if part.is_cuda else part.pin_memory() for part in pair)
                moved = [part.to(self.device, non_blocking=True) for part in pinned]
            yield moved[0], moved[1], stream.record_event()


def _ahead(batches: Iterator[Any], depth: int) -> Generator[Any, None, None]:
    """Yield batches of which a thread reads up to `depth` ahead."""
    thread = ThreadPoolExecutor(1, "skipkernels features")
    waiting = deque(thread.submit(next, batches, None) for _ in range(depth))
    try:
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, batches, None))
            yield batch
            del batch  # so that its memory can be freed
    finally:
        thread.shutdown(cancel_futures=True)
