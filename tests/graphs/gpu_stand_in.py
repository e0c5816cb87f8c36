"""A stand-in for a GPU: streams, the autograd of streams, the freeing of memory, and CUDA graphs, on the CPU.

    with stand_in() as gpu:         the CPU takes the paths of a GPU
        step(images, labels)
    gpu.captures, gpu.replays       numbers of them

An operator runs at once, whatever its stream, so results are those of the CPU. What a GPU would do differently is
checked:

- *Streams* must wait for each other: see `streams.py`.
- *Graphs.* A capture records operators with the addresses and numbers that they have then; a replay runs these. It
  launches nothing: what it wrote is restored. Memory that is allocated in a capture belongs to the graph. A replay
  begins with undefined values there, since an allocation may have what was freed before it, and reads other memory only
  while it is in use.
- *The update* reads its tables, as the Triton kernel does: they must have the addresses of its tensors by then.

What a GPU would not report is a `Fault`.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from skipkernels import functional
from skipkernels.graphs import graphed_step
from skipkernels.ops import launching, registration, sgd_momentum
from skipkernels.towers import prompts
from tests.graphs.streams import DeviceMemory, Fault, Stream

_UPDATE_NAME = functional.sgd_momentum_.__name__
_UPDATE = getattr(torch.ops.skipkernels, _UPDATE_NAME).default
_ALLOCATES = ("empty", "new_empty")  # begin of the names of operators that read and write nothing
_UNDEFINED = 0xFF  # each byte: NaN, or -1, which is no address


# ---- graphs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class At:  # a NamedTuple would be a container to tree_map
    """A tensor by its address."""

    storage: StorageWeakRef
    address: int
    layout: tuple[Any, ...]  # dtype, offset, size and strides

    @classmethod
    def of(cls, tensor: Tensor) -> At:
        storage = tensor.untyped_storage()
        layout = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()
        return cls(StorageWeakRef(storage), storage.data_ptr(), layout)

    def tensor(self) -> Tensor:
        dtype, offset, size, strides = self.layout
        if 0 in size:
            return torch.empty_strided(size, strides, dtype=dtype)
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None or storage.data_ptr() != self.address:
            raise Fault(f"a replay uses memory that was freed after the capture: of {self.layout}")
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, strides)


class Call(NamedTuple):
    """A call in a graph: its arguments, and its results in memory of their own."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[At]


class Graph:
    """A captured function."""

    def __init__(self, gpu: Gpu):
        self._gpu = gpu
        self._calls: list[Call] = []
        self._own: dict[int, torch.UntypedStorage] = {}  # by address
        self._before: dict[int, tuple[At, Tensor]] = {}  # bytes of memory that the capture wrote, by address

    def own(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._own[storage.data_ptr()] = storage

    def add(self, *call: Any) -> None:
        """Record a `Call`, given with tensors."""
        self._calls.append(Call(*tree_map_only(Tensor, At.of, call)))

    def save(self, tensor: Tensor) -> None:
        """Save the bytes of memory that is written."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own and storage.data_ptr() not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage.data_ptr()] = At.of(whole), whole.clone()

    def end(self) -> None:
        """End the capture: nothing was launched."""
        for at, before in self._before.values():
            at.tensor().copy_(before)
        self._before.clear()
        for storage in self._own.values():
            storage.fill_(_UNDEFINED)

    def replay(self) -> None:
        self._gpu.replays += 1
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            for storage in self._own.values():
                storage.fill_(_UNDEFINED)
            for call in self._calls:
                args, kwargs = tree_map_only(At, At.tensor, (call.args, call.kwargs))
                new = _new_of(call.function(*args, **kwargs), args, kwargs)
                for at, tensor in zip(call.results, new, strict=True):
                    at.tensor().copy_(tensor)
            given = {at.address: at for call in self._calls for at in _leaves(At, call.args, call.kwargs)}
            outside = [at.tensor() for address, at in given.items() if address not in self._own]
        self._gpu.use([], outside)  # one launch, which may write any of them


def _leaves(kind: Any, *tree: Any) -> list[Any]:
    """Objects of a kind in nested lists, tuples and dictionaries; tree_leaves takes most of a test."""
    found: list[Any] = []
    for x in tree:
        if isinstance(x, kind):
            found.append(x)
        elif isinstance(x, list | tuple | dict):
            found += _leaves(kind, *(x.values() if isinstance(x, dict) else x))
    return found


def _new_of(out: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors of a result in memory of none of the arguments, except for empty ones."""
    given = {x.untyped_storage().data_ptr() for x in _leaves(Tensor, args, kwargs)} | {0}
    return [x for x in _leaves(Tensor, out) if x.untyped_storage().data_ptr() not in given]


def _written(function: torch._ops.OpOverload, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors among the arguments that an operator writes."""
    arguments = function._schema.arguments
    values = [args[i] if i < len(args) else kwargs.get(x.name) for i, x in enumerate(arguments)]
    written = [value for x, value in zip(arguments, values, strict=True) if x.alias_info and x.alias_info.is_write]
    return _leaves(Tensor, written)


# ---- the device ------------------------------------------------------------------------------------------------------


class Gpu(TorchDispatchMode):
    """Runs operators, checks their streams, and records them during a capture."""

    def __init__(self) -> None:
        super().__init__()
        self.captures = self.replays = 0
        self._streams = [Stream()]  # contexts of `torch.cuda.stream`; the last one is current
        self._begins: list[tuple[int, Stream]] = [(0, self._streams[0])]  # sequence numbers of autograd and streams
        self._of_node: Stream | None = None  # of the node of backward that runs
        self._memory = DeviceMemory()
        self._graph: Graph | None = None  # of the capture

    @property
    def captures_now(self) -> bool:
        return self._graph is not None

    def current_stream(self, *_: Any) -> Stream:
        return self._of_node or self._streams[-1]

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Replace `torch.cuda.stream`."""
        self._streams.append(stream)
        self._begins.append((torch.autograd._get_sequence_nr(), stream))
        try:
            yield
        finally:
            self._streams.pop()
            self._begins.append((torch.autograd._get_sequence_nr(), self._streams[-1]))

    def use(self, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Check one operator on the current stream, which reads and writes these tensors."""
        self._memory.use(self.current_stream(), reads, writes)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is _UPDATE:
            with self:  # its tables, and copies of what is not contiguous
                registration.definitions[_UPDATE_NAME].launch(*args)
            return self._launch(
                _UPDATE, args, reads=_leaves(Tensor, *args[1], *args[3:7]), writes=_written(function, args, {})
            )
        written = _written(function, args, kwargs)
        if self._graph is not None:
            if _leaves(torch.Generator, args, kwargs):
                raise Fault(f"a graph would draw the same random numbers in each replay: {function}")
            for tensor in written:
                self._graph.save(tensor)
        out = function(*args, **kwargs)
        new = _new_of(out, args, kwargs)
        for tensor in new:
            self._memory.allocate(tensor, self.current_stream())
            if self._graph is not None:
                self._graph.own(tensor)
        if function._opname.startswith(_ALLOCATES) or not (written or new):  # no launch: an allocation or a view
            return out
        reads = [x for x in _leaves(Tensor, args, kwargs) if all(x is not other for other in written)]
        self.use(reads, [*written, *new])
        if self._graph is not None:
            self._graph.add(function, args, kwargs, new)
        return out

    def _launch(self, function: Callable[..., Any], args: Any, *, reads: list[Tensor], writes: list[Tensor]) -> None:
        """Run a function that returns nothing, or record it."""
        self.use(reads, writes)
        if self._graph is not None:
            return self._graph.add(function, args, {}, [])
        with _disable_current_modes():
            function(*args)

    def table(self, numbers: Sequence[int], device: torch.device, *, repeat: bool = False) -> Tensor:
        """Replace `sgd_momentum._table`: the update reads it."""
        table = _table(numbers, device, repeat=repeat)
        entries = [index for index, times in enumerate(numbers) for _ in range(times)] if repeat else [*numbers]
        self._launch(_check_table, (table, entries), reads=[table], writes=[])
        return table

    # ---- autograd

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Replace `Tensor.backward`: a node runs on the stream of its forward, after those of its gradients.

        At the end, before the callbacks, the stream of the caller waits for all others.
        """
        caller, streams, nodes = self.current_stream(), [], [loss.grad_fn]
        seen = set(nodes)

        def at_the_end() -> None:
            self._of_node = None
            for stream in streams:
                caller.wait_stream(stream)

        def begin(node: Any, gradients: tuple[Tensor | None, ...]) -> None:
            if not streams:
                torch.autograd.Variable._execution_engine.queue_callback(at_the_end)
            memories = [self._memory.of(x) for x in gradients if x is not None]
            if not hasattr(node, "variable"):  # else its stream is that of its gradient
                self._of_node = self._stream_at(node._sequence_nr())
            streams.append(self._of_node)
            for memory in memories:
                memory.recorded.add(self._of_node.stream_id)  # the engine calls `record_stream`
                self._of_node.merge({} if memory.write is None else memory.write.clock)

        while nodes:
            node = nodes.pop()
            node.register_prehook(functools.partial(begin, node))
            new = {other for other, _ in node.next_functions if other is not None} - seen
            seen |= new
            nodes += new
        try:
            _backward(loss, gradient)
        finally:
            self._of_node = None

    def _stream_at(self, number: int) -> Stream:
        """The stream on which the node of autograd with this number was created."""
        return self._begins[bisect.bisect_right(self._begins, number, key=lambda begin: begin[0]) - 1][1]

    def capture_graph(self, run: Callable[[], Any], stream: Stream) -> tuple[Graph, Any]:
        """Replace `graphs.capture.capture_graph`."""
        self.captures += 1
        graph = self._graph = Graph(self)
        try:
            stream.wait_stream(self.current_stream())  # torch.cuda.graph synchronises the device
            with self.stream(stream):
                out = run()
            return graph, out
        finally:
            self._graph = None
            with _disable_current_modes():
                graph.end()
            self.current_stream().wait_stream(stream)


def _check_table(table: Tensor, entries: list[int]) -> None:
    if table.tolist() != entries:
        raise Fault("the update reads a table without its numbers")


_backward, _table = Tensor.backward, sgd_momentum._table


@contextlib.contextmanager
def stand_in() -> Iterator[Gpu]:
    """Let the CPU take the paths of a GPU."""
    Stream.ids = itertools.count()
    sgd_momentum._kept_table.cache_clear()
    gpu = Gpu()
    cuda = {
        "Stream": Stream,
        "current_stream": gpu.current_stream,
        "stream": gpu.stream,
        "device": lambda device: contextlib.nullcontext(),
        "get_allocator_backend": lambda: "native",  # a build without CUDA has none
    }
    with (
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(Tensor, "backward", lambda loss, gradient=None: gpu.backward(loss, gradient)),
        mock.patch.object(launching, "runs_beside_host", lambda device: True),
        mock.patch.object(launching, "current_stream", lambda device: gpu.current_stream().stream_id),
        mock.patch.object(launching, "is_captured", lambda device: gpu.captures_now),
        mock.patch.object(launching, "_run", lambda *kernel: None),  # of the update
        mock.patch.object(prompts, "counts_are_known", lambda device: False),
        mock.patch.object(sgd_momentum, "_table", gpu.table),
        mock.patch.object(graphed_step.GraphedStep, "_on_gpu", lambda step: True),
        mock.patch.object(graphed_step, "capture_graph", gpu.capture_graph),
        gpu,
    ):
        yield gpu
