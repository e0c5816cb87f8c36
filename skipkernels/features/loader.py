"""Batches of features, read ahead of training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .table import FeatureTable


class _Batch(NamedTuple):
    features: Tensor  # [B, …]
    labels: Tensor  # [B] int64
    copied: torch.cuda.Event | None  # end of the copy to a GPU, on another stream
    state: dict[str, Any] | None  # of the sampler after this batch, which may be ahead of the loop


class FeatureLoader:
    """Iterable over the batches of an epoch: (features [B, …], labels [B] int64).

    Created by `FeatureCache.loader`.

    Attributes:
        epoch: Number of completed epochs.
        seconds_waited: Seconds that iterations have waited for batches.
    """

    def __init__(
        self,
        load_epoch: Callable[[int], FeatureTable],
        labels: Tensor,
        sampler: Iterable[list[int]],
        *,
        device: torch.device | None,
        prefetch: int,
    ):
        self.sampler, self.prefetch, self.device = sampler, prefetch, device
        self.epoch, self.seconds_waited = 0, 0.0
        self._load_epoch, self._labels = load_epoch, labels
        self._state: dict[str, Any] | None = None  # of the sampler after the last batch; None at the end of an epoch

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of an epoch; after a state was loaded, over the rest of its epoch."""
        batches = self._read(self._load_epoch(self.epoch))
        if self.prefetch > 0:
            batches = _read_in_thread(batches, self.prefetch)
        try:
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                self.seconds_waited += time.perf_counter() - started
                if batch is None:
                    break
                features, labels, copied, self._state = batch
                if copied is not None:
                    stream = torch.cuda.current_stream(features.device)
                    stream.wait_event(copied)
                    features.record_stream(stream)
                    labels.record_stream(stream)
                del batch  # the caller alone decides how long it lives
                yield features, labels
        finally:
            batches.close()
        self.epoch, self._state = self.epoch + 1, None

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch; after loading it, the next iteration yields the remaining batches.

        After the last batch, in the body of the loop, none remain: the next iteration ends at once.
        """
        state = self._sampler_state() if self._state is None else self._state
        if state is None:
            raise TypeError(
                "FeatureLoader.state_dict: this sampler has no state_dict; name a sampler in FeatureCache.loader."
            )
        return state | {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state_dict`."""
        self.sampler.load_state_dict(state)  # type: ignore[attr-defined]
        self.epoch, self._state = state["epoch"], None

    def _sampler_state(self) -> dict[str, Any] | None:
        return self.sampler.state_dict() if hasattr(self.sampler, "state_dict") else None

    def _read(self, table: FeatureTable) -> Generator[_Batch, None, None]:
        """Read the batches of an epoch, and move them to the device."""
        stream = None
        if self.device is not None and self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
        for numbers in self.sampler:
            yield self._batch(table, numbers, stream)  # which lives as long as the caller holds it

    def _batch(self, table: FeatureTable, numbers: list[int], stream: torch.cuda.Stream | None) -> _Batch:
        if any(not 0 <= number < len(self._labels) for number in numbers):
            raise IndexError(f"FeatureLoader: images are numbered from 0 to {len(self._labels) - 1}; got {numbers}.")
        ids = torch.as_tensor(numbers, dtype=torch.int64)
        features = table.rows(ids)
        labels, state = self._labels[ids].to(features.device), self._sampler_state()
        if stream is not None:
            return _Batch(*_copied(features, labels, stream), state)
        if self.device is not None:
            features, labels = features.to(self.device), labels.to(self.device)
        return _Batch(features, labels, None, state)


def _copied(features: Tensor, labels: Tensor, stream: torch.cuda.Stream) -> tuple[Tensor, Tensor, torch.cuda.Event]:
    """Copy features and labels to the GPU of a stream; return also the event at the end of the copy."""
    if features.is_cuda:  # gathered on the current stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        # PyTorch reuses pinned memory after the copy to the GPU.
        features, labels = (
            (part if part.is_cuda else part.pin_memory()).to(stream.device, non_blocking=True)
            for part in (features, labels)
        )
    return features, labels, stream.record_event()


def _read_in_thread(batches: Iterator[Any], depth: int) -> Generator[Any, None, None]:
    """Yield batches of which a thread reads up to `depth` ahead."""
    thread = ThreadPoolExecutor(1, "skipkernels features")
    waiting = deque(thread.submit(next, batches, None) for _ in range(depth))
    try:
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(next, batches, None))
            yield batch
            del batch  # so that its memory can be freed
    finally:
        for reading in waiting:  # `cancel_futures` fails at the exit of the process
            reading.cancel()
        thread.shutdown()
