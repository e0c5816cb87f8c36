"""Streams on the CPU, and the use of memory by their operators: a race, if this were a GPU, is a `Fault`.

A stream has a vector clock, which `wait_stream` merges. By the clocks, an operator that uses memory must come after the
write of it, and a write after the reads. Memory is freed when its last tensor dies, and given to a later allocation of
the stream that allocated it, which must come after the uses by all other streams.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Fault(AssertionError):
    """A race or a use of freed memory, if this were a GPU."""


class Stream:
    """A stream; `clock` has the number of operators of each stream that its next one comes after."""

    ids = itertools.count()

    def __init__(self, *_: Any):
        self.stream_id = next(Stream.ids)
        self.clock: dict[int, int] = {}
        self.freed: list[Use] = []  # last uses of memory that was freed since the last allocation

    def wait_stream(self, other: Stream) -> None:
        self.merge(other.clock)

    def merge(self, clock: dict[int, int]) -> None:
        for stream, time in clock.items():
            self.clock[stream] = max(time, self.clock.get(stream, 0))

    def operator(self) -> Use:
        self.clock[self.stream_id] = self.clock.get(self.stream_id, 0) + 1
        return Use(self.stream_id, self.clock[self.stream_id], dict(self.clock))

    def comes_after(self, use: Use) -> bool:
        return self.clock.get(use.stream, 0) >= use.time

    def allocate(self) -> None:
        for use in self.freed:
            if not self.comes_after(use):
                raise Fault(f"stream {self.stream_id} allocates memory that stream {use.stream} still uses")
        self.freed.clear()


class Use(NamedTuple):
    """An operator on a stream: its time there, and the clock after it."""

    stream: int
    time: int
    clock: dict[int, int]


class Memory:
    """A storage: the stream that allocated it, and its uses."""

    def __init__(self, storage: torch.UntypedStorage, stream: Stream | None, free: Callable[[Memory], None]):
        self.address, self.nbytes = storage.data_ptr(), storage.nbytes()
        self.stream = stream  # on which it was allocated, None if that was not seen
        self.write: Use | None = None
        self.reads: dict[int, Use] = {}  # the last ones since the write, by stream
        self.used: dict[int, Use] = {}  # the last ones, by stream
        self.recorded: set[int] = set()  # streams of `record_stream`, which the allocator waits for
        self.weak = weakref.ref(storage, lambda _: free(self))


class DeviceMemory:
    """The storages that operators use."""

    def __init__(self) -> None:
        self._memory: dict[int, Memory] = {}  # by address

    def allocate(self, tensor: Tensor, stream: Stream) -> None:
        """Check the allocation of the memory of a new tensor."""
        stream.allocate()
        self.of(tensor, stream)

    def of(self, tensor: Tensor, allocated_on: Stream | None = None) -> Memory:
        storage = tensor.untyped_storage()
        found = self._memory.get(storage.data_ptr())
        if found is None or found.weak() is None:
            found = self._memory[storage.data_ptr()] = Memory(storage, allocated_on, self._free)
        return found

    def _free(self, memory: Memory) -> None:
        if self._memory.get(memory.address) is memory:
            del self._memory[memory.address]
        if memory.stream is not None:
            memory.stream.freed += [use for stream, use in memory.used.items() if stream not in memory.recorded]

    def use(self, stream: Stream, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Check one operator on a stream, which reads and writes these tensors."""
        read, written = ([self.of(x) for x in tensors if x.numel() > 0] for tensors in (reads, writes))
        for memory in (*read, *written):
            if memory.write is not None and not stream.comes_after(memory.write):
                raise Fault(f"stream {stream.stream_id} uses memory before stream {memory.write.stream} has written it")
        for memory in written:
            for use in memory.reads.values():
                if not stream.comes_after(use):
                    raise Fault(f"stream {stream.stream_id} writes memory before stream {use.stream} has read it")
        operator = stream.operator()
        for memory in read:
            memory.reads[operator.stream] = memory.used[operator.stream] = operator
        for memory in written:
            memory.reads.clear()
            memory.write = memory.used[operator.stream] = operator
