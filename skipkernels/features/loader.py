"""Batches of features: read ahead of the training, into buffers that are used again."""

from __future__ import annotations

import atexit
import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .samplers import BatchSampler

if TYPE_CHECKING:
    from .feature_cache import FeatureCache

Pair = tuple[Tensor, Tensor]


class Rows(Protocol):
    """Rows of features by number: a store's, or those in memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a row."""

    @property
    def dtype(self) -> torch.dtype:
        """Of a row as it comes out."""

    @property
    def device(self) -> torch.device:
        """Where it comes out."""

    @property
    def rows_per_read(self) -> int:
        """How many rows to read at once while more are expected; 0 for any number."""

    def expect(self, index: Tensor) -> None:
        """Rows by number [B] will be asked for."""

    def gather(self, index: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Rows [B, *shape] by number [B], into `out` if there is one."""


class _Piece(NamedTuple):
    """Some rows of a batch.

    Attributes:
        batch: Images [B] of the batch.
        rows: Numbers of these rows.
        start: Where they begin in the batch.
    """

    batch: Tensor
    rows: Tensor
    start: int


class FeatureLoader:
    """An iterable over the batches of an epoch: (features [B, …], labels [B] int64).

    Made by `FeatureCache.loader`. A buffer is used again once nothing refers to it: keeping batches is safe.

    Attributes:
        seconds_waited: How long, since it was made, whoever trains has waited for a batch.
    """

    def __init__(
        self,
        cache: FeatureCache,
        sampler: Iterable[list[int]],
        *,
        dtype: torch.dtype | None,
        device: torch.device | None,
        prefetch: int,
    ):
        self.cache, self.sampler, self.prefetch = cache, sampler, prefetch
        self.dtype = dtype
        self.device = device
        self.seconds_waited = 0.0
        self._epoch = 0  # of a sampler that doesn't count
        self._began: dict[str, Any] | None = None  # the sampler's state when the epoch that is going on began
        self._given = 0  # batches since then
        self._buffers = _Buffers(pinned=device is not None and device.type == "cuda")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.sampler)  # type: ignore[arg-type]

    @property
    def epoch(self) -> int:
        """Epochs that are over."""
        if self._began and "epoch" in self._began:  # the sampler may be ahead
            return self._began["epoch"]
        return getattr(self.sampler, "epoch", self._epoch)

    def __iter__(self) -> Iterator[Pair]:
        """The batches of an epoch; of one that a loaded state has begun, those that are left."""
        if self._began is not None and isinstance(self.sampler, BatchSampler):
            self.sampler.abandon()  # an epoch that was broken off
        self._began, self._given = self._sampler_state(), 0
        rows, offset = self.cache.rows_of_epoch(self.epoch)
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
                self._given += 1
                features, labels, ready = batch
                if ready is not None:  # it came on a stream of its own
                    stream = torch.cuda.current_stream(features.device)
                    stream.wait_event(ready)
                    features.record_stream(stream)
                    labels.record_stream(stream)
                yield features, labels
        finally:
            batches.close()
        self._epoch, self._began, self._given = self._epoch + 1, None, 0

    def state_dict(self) -> dict[str, Any]:
        """Where it is: the next iteration after loading this gives the batches that were not given yet.

        Raises:
            TypeError: If the sampler has no `state_dict`.
        """
        state = self._sampler_state() if self._began is None else self._began
        if "batches" not in state:
            raise TypeError("FeatureLoader.state_dict: this sampler has none; use one of FeatureCache.loader's.")
        return state | {"batches": state["batches"] + self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            TypeError: If the sampler has no `load_state_dict`.
            ValueError: If the state is of another sampler, batch size, number of processes or images.
        """
        if not hasattr(self.sampler, "load_state_dict"):
            raise TypeError("FeatureLoader.load_state_dict: this sampler has none; use one of FeatureCache.loader's.")
        self.sampler.load_state_dict(state)
        self._began, self._given = None, 0

    def _sampler_state(self) -> dict[str, Any]:
        return self.sampler.state_dict() if hasattr(self.sampler, "state_dict") else {}

    def _read_all(self, rows: Rows, offset: int) -> Generator[Pair, None, None]:
        """The batches, read piece by piece; what is read ahead of the training is told to the disk one piece before."""
        pieces = self._pieces(offset, rows.rows_per_read if self.prefetch > 0 else 0)
        out: Tensor | None = None
        piece = next(pieces, None)
        while piece is not None:
            following = next(pieces, None)
            if self.prefetch > 0 and following is not None:
                rows.expect(following.rows)
            if piece.start == 0:
                out = self._buffer(rows, len(piece.batch))
            stop = piece.start + len(piece.rows)
            features = rows.gather(piece.rows, out=None if out is None else out[piece.start : stop])
            if stop == len(piece.batch):
                features = features.to(self.dtype or rows.dtype) if out is None else out
                yield features, self.cache.labels[piece.batch].to(rows.device)
                out = None
            del features  # a batch that is given away is not held here while the next one is read
            piece = following

    def _pieces(self, offset: int, most: int) -> Iterator[_Piece]:
        """Pieces of at most so many rows of the batches, or whole batches."""
        own = isinstance(self.sampler, BatchSampler)  # its numbers need no look
        for numbers in self.sampler:
            batch = torch.tensor(numbers) if own else self._checked(numbers)
            index = batch + offset if offset else batch
            size = most or len(index) or 1
            for start in range(0, len(index) or 1, size):
                yield _Piece(batch, index[start : start + size], start)

    def _checked(self, batch: list[int]) -> Tensor:
        numbers = np.asarray(batch, dtype=np.int64)
        if len(numbers) > 0 and not 0 <= numbers.min() <= numbers.max() < len(self.cache):
            wrong = numbers[(numbers < 0) | (numbers >= len(self.cache))][0]
            raise IndexError(f"FeatureLoader: images are numbered from 0 to {len(self.cache) - 1}; got {wrong}.")
        return torch.from_numpy(numbers)

    def _buffer(self, rows: Rows, count: int) -> Tensor | None:
        """Memory for a batch; none where rows are on a device that has its own."""
        if rows.device.type != "cpu":
            return None
        return self._buffers.take((count, *rows.shape), self.dtype or rows.dtype)

    def _to_device(self, batches: Iterator[Pair]) -> Generator[tuple[Tensor, Tensor, Any], None, None]:
        """Batches where they are wanted; on a GPU with the event after which they are there."""
        if self.device is None or self.device.type != "cuda":
            for features, labels in batches:
                if self.device is not None:
                    features, labels = features.to(self.device), labels.to(self.device)
                yield features, labels, None
            return
        stream = torch.cuda.Stream(self.device)
        under_way: deque[tuple[Any, Tensor]] = deque()  # a buffer may be used again when its copy is over
        try:
            for features, labels in batches:
                if features.is_cuda:  # gathered there
                    stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(stream):
                    moved = [part.to(self.device, non_blocking=True) for part in (features, labels)]
                    event = torch.cuda.Event()
                    event.record(stream)
                under_way.append((event, features))
                if len(under_way) > 1:
                    under_way.popleft()[0].synchronize()
                del features
                yield moved[0], moved[1], event
        finally:
            for event, _ in under_way:
                event.synchronize()


class _Buffers:
    """Memory for batches, which comes back by itself when the last tensor on it has gone."""

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        memory = None
        while memory is None or memory.nbytes < size:  # too small: of an epoch's last batch, or another dtype
            try:
                memory = self._free.pop()  # one step: another thread may ask, and give back
            except IndexError:
                memory = torch.empty(max(size, 1), dtype=torch.uint8, pin_memory=self._pinned).numpy()
        part = memory[:size]
        weakref.finalize(part, self._free_again, memory)
        return torch.from_numpy(part).view(dtype).view(shape)

    def _free_again(self, memory: np.ndarray) -> None:
        self._free.append(memory)


def _ahead(batches: Iterator[Any], depth: int) -> Generator[Any, None, None]:
    """The same batches, read by a thread as long as fewer than `depth` are waiting."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: tuple[Any, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for batch in batches:
                put((batch, None))
                if stopped.is_set():
                    return
                del batch  # its buffer is not this thread's any more
            put((None, None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=read, name="skipkernels features", daemon=True)

    def stop() -> None:
        stopped.set()
        thread.join()

    thread.start()
    atexit.register(stop)  # a process that ends while it reads is aborted
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
            del batch
    finally:
        stop()
        atexit.unregister(stop)
