"""Processes of a run that torchrun started: the first writes and the others wait; an error of one is raised on all."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ...formatting import first_line
from ..data.base import InputError
from ..option_groups import MAX_TIMEOUT, ProcessOptions
from .errors import argument_error
from .signals import handled

if TYPE_CHECKING:
    import torch

_CONNECT_SECONDS = 600.0  # in which all processes must start
_POLL_SECONDS = 0.05
_HEARTBEAT_SECONDS = 1.0  # between heartbeats of a process
_LAG_SECONDS = 3.0  # for the process that failed to report its error, after others have noticed the failure
_END_SECONDS = 15.0  # in which the first process ends its run folder after an error; torchrun kills after 30 s
_ERROR, _END, _LOST, _HEARTBEAT = "error", "end", "lost", "heartbeat"


class ProcessError(RuntimeError):
    """Error for a process of the run that ended without a report, or that cannot be reached."""


class Processes:
    """Processes of a run. By default there is only this one.

    Without a group all methods do what a single process needs, at no cost.

    Args:
        rank: Number of this process.
        size: Number of processes.
        local_rank: Number of this process on its host.
        host: Number of the host.
        store: Key-value store that the processes share.
        timeout: Seconds after which a process that does not answer counts as lost.

    Attributes:
        first: True on the process that writes files and shows progress.
        group: Process group, or None.
        sockets: Connections of the group to other processes: inode by file descriptor.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        host: int = 0,
        store: Any = None,
        timeout: float = ProcessOptions.timeout,
    ):
        self.rank, self.size, self.first = rank, size, rank == 0
        self.group: torch.distributed.ProcessGroup | None = None
        self.sockets: dict[int, int] = {}
        self._local_rank, self._host, self._store, self._timeout = local_rank, host, store, timeout

    def set_device(self, device: str) -> None:
        """Let "cuda" and "auto" be the GPU of this process. Call it before anything is on a GPU.

        Raises:
            InputError: If `device` names one GPU, or there are fewer GPUs than processes on this host.
        """
        import torch

        if self.size == 1 or device == "cpu" or not torch.cuda.is_available():
            return
        if ":" in device:
            raise argument_error(
                "device", f"{device} is one GPU, and each of {self.size} processes uses its own; choose cuda."
            )
        if self._local_rank >= torch.cuda.device_count():
            raise argument_error(
                "device",
                f"process {self.rank} has number {self._local_rank} on its host, which has "
                f"{torch.cuda.device_count()} GPUs; start fewer processes, or choose cpu.",
            )
        torch.cuda.set_device(self._local_rank)

    def share(self, count: int) -> range:
        """Consecutive items of this process among `count`; the first processes may have one more than others."""
        return self._shares(count)[self.rank]

    def _shares(self, count: int) -> list[range]:
        size, longer = divmod(count, self.size)
        starts = [rank * size + min(rank, longer) for rank in range(self.size + 1)]
        return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]

    def gather(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Gather rows of the `share` of each process to [count, …]; collective."""
        from ...parallel import gather_rows

        return (
            rows if self.group is None else gather_rows(rows, [len(part) for part in self._shares(count)], self.group)
        )

    def sum(self, numbers: list[int]) -> list[int]:
        """Sum numbers over the processes; collective."""
        import torch
        import torch.distributed as dist

        if self.group is None:
            return numbers
        total = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with those of the first process, in place; collective."""
        import torch.distributed as dist

        if self.group is None:
            return
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, 0, group=self.group)
            tensor.copy_(whole)

    def from_first(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a JSON value that the first process computes; the others wait for it."""
        if self.size == 1:
            return compute()
        if self.first:
            value = compute()
            self._store.set(name, json.dumps(value))
            return value
        self._await(name)
        return json.loads(self._store.get(name))

    @contextlib.contextmanager
    def one_first(self, name: str) -> Iterator[None]:
        """Run a block on the first process of each host before the others, which find what it downloaded."""
        key, leads = f"{name}, host {self._host}", self._local_rank == 0
        if not leads:
            self._await(key)
        yield
        if self.size > 1 and leads:
            self._store.set(key, "")

    def barrier(self, name: str) -> None:
        """Wait for all processes, as long as they run; unlike a collective, without a timeout."""
        if self.size > 1:
            self._store.set(f"{name}, process {self.rank}", "")
            for rank in range(self.size):
                self._await(f"{name}, process {rank}")

    # ---- errors ------------------------------------------------------------------------------------------------

    def _await(self, key: str, seconds: float = float("inf")) -> None:
        """Wait until a key is set; raise a ProcessError if a process fails meanwhile, or is no longer running."""
        began, heartbeats = time.monotonic(), None
        while not self._store.check([key]):
            if not key.startswith((_ERROR, _END)):
                if self._store.check([_ERROR]):
                    raise ProcessError("Another process raised an error.")  # replaced by that error
                # The first process sees that of all others: each of them need not ask for W − 1 numbers a second.
                heartbeats = heartbeats or Heartbeats(self._store, range(1, self.size) if self.first else [0])
                if silent := heartbeats.silent(self._timeout):
                    raise ProcessError(self._lost_message(silent, f"no heartbeat for {self._timeout:g} seconds"))
            if time.monotonic() - began > seconds:
                return
            time.sleep(_POLL_SECONDS)

    def first_error(self, error: BaseException) -> BaseException:
        """Return the first error of all processes: `error`, unless another process has reported one before."""
        follows, lost = _follows(error), _lost(error)
        if lost is not None:
            reason = re.sub(r"^\[\S+\] ", "", " ".join(str(lost).split())).partition(". ")[0]  # without PyTorch's file
            error = ProcessError(self._lost_message([], reason))
        try:
            if lost is not None and (silent := self._silent()):
                error = ProcessError(self._lost_message(silent, reason))
            elif follows and lost is None:
                self._await(_ERROR, _LAG_SECONDS)
            own = json.dumps(_description(error, self.rank))
            kept = self._store.compare_set(_ERROR, "", own)
            return error if kept.decode() == own else _rebuilt(json.loads(kept))
        except RuntimeError:  # the store has ended, with the process or launcher that held it
            return error

    def _silent(self) -> list[int]:
        """Return the lost processes: those without a heartbeat, else without a report; none if one reports an error."""
        heartbeats = Heartbeats(self._store, range(self.size))
        self._store.set(f"{_LOST} {self.rank}", "")
        self._disconnect()  # so that all others report it now
        began = time.monotonic()
        while time.monotonic() - began < _LAG_SECONDS:
            if self._store.check([_ERROR]):
                return []
            missing = [rank for rank in range(self.size) if not self._store.check([f"{_LOST} {rank}"])]
            if not missing:
                return []
            time.sleep(_POLL_SECONDS)
        silent = set(heartbeats.silent(_LAG_SECONDS - _HEARTBEAT_SECONDS))
        return [rank for rank in missing if rank in silent] or missing

    def _lost_message(self, ranks: list[int], reason: str) -> str:
        numbers = ", ".join(map(str, ranks))
        which = f"process{'es' * (len(ranks) > 1)} {numbers}" if ranks else "another"
        return (
            f"Process {self.rank} of {self.size} lost the connection to {which}, which was killed or stopped, or does "
            f"not answer ({reason}). Continue with `resume=True` from what is complete."
        )

    def _disconnect(self) -> None:
        """Close the connections of the group: a collective that waits for this process, on any other, raises an error.

        `ProcessGroup.abort` does this for NCCL, but leaves a collective of gloo waiting for its timeout.
        """
        for descriptor, inode in self.sockets.items():
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino == inode:
                    with socket.socket(fileno=os.dup(descriptor)) as connection:
                        connection.shutdown(socket.SHUT_RDWR)
        self.sockets = {}

    def heartbeat(self) -> contextlib.AbstractContextManager[None]:
        """Send heartbeats in a block."""
        return _heartbeat(self._store, self.rank)

    def leave_after_error(self) -> None:
        """Leave the group, so that no other process waits for this one, and let the first end its run folder."""
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError, ValueError):
            if self.group is not None:
                self._disconnect()
                self.group.abort()
                dist.destroy_process_group()
        with contextlib.suppress(RuntimeError):
            if self.first:
                self._store.set(_END, "")
                deadline = time.monotonic() + _LAG_SECONDS  # it may hold the store, in which the others read the error
                for rank in range(1, self.size):
                    self._await(f"{_END} {rank}", deadline - time.monotonic())
            else:
                self._await(_END, _END_SECONDS)
                self._store.set(f"{_END} {self.rank}", "")


class Heartbeats:
    """Heartbeats of processes: a counter of each in the store, which a thread of it increments every second."""

    def __init__(self, store: Any, ranks: Iterable[int]):
        self._store, self._looked = store, time.monotonic()
        self._seen = {rank: (store.add(f"{_HEARTBEAT} {rank}", 0), self._looked) for rank in ranks}

    def silent(self, seconds: float) -> list[int]:
        """Return the processes without a heartbeat for some seconds. Reads the counters at most once a second."""
        now = time.monotonic()
        if now - self._looked < _HEARTBEAT_SECONDS:
            return []
        self._looked = now
        for rank, (count, _) in self._seen.items():
            if (new := self._store.add(f"{_HEARTBEAT} {rank}", 0)) != count:
                self._seen[rank] = new, now
        return [rank for rank, (_, since) in self._seen.items() if now - since >= seconds]


@contextlib.contextmanager
def _heartbeat(store: Any, rank: int) -> Iterator[None]:
    """Send heartbeats from a thread, on its own connection: the main thread may wait on the other."""
    own, ended = store.clone(), threading.Event()
    own.add(f"{_HEARTBEAT} {rank}", 1)

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # the store has ended
            while not ended.wait(_HEARTBEAT_SECONDS):
                own.add(f"{_HEARTBEAT} {rank}", 1)

    thread = threading.Thread(target=beat, name="skipkernels heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_HEARTBEAT_SECONDS)  # the store may not answer


ALONE = Processes()
_joined: Processes | None = None


def launched() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return True if this is the first of the processes that torchrun started, or the only one."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined(timeout: float = ProcessOptions.timeout) -> Iterator[Processes]:
    """Join the processes that torchrun started, with gloo for the CPU and NCCL for GPUs.

    The first error in the block on any process is raised on all. Where it is not that of the process itself, it has the
    attribute `reported`. Within another `joined` block this does nothing.

    Raises:
        InputError: If this process already has a process group.
        ProcessError: If a process ended without a report.
    """
    global _joined
    if _joined is not None or launched() == 1:
        yield _joined or ALONE
        return
    processes = _join(timeout)
    _joined = processes
    try:
        with processes.heartbeat():
            try:
                processes.barrier("start")  # a process that disconnects early must not disturb those that still connect
                yield processes
                processes.sum([0])  # no process leaves before all have ended: the first may hold the store
            except BaseException as error:
                # The launcher sends these to all processes after the first error.
                with handled((signal.SIGINT, signal.SIGTERM), signal.SIG_IGN):
                    first = processes.first_error(error)
                    processes.leave_after_error()
                if first is error:
                    raise
                raise first from error
        import torch.distributed as dist

        dist.destroy_process_group()
    finally:
        _joined = None


@functools.cache
def _rendezvous() -> Any:
    """Return the store, rank and number of processes. Made once: without torchrun the first process holds the store."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=timedelta(seconds=_CONNECT_SECONDS)))


def _group_name(store: Any, rank: int, size: int) -> str:
    """Return a name that all processes of this start share, and that no earlier start has used.

    torchrun keeps its store when it restarts processes, so that they would read entries of killed processes; and its
    number of restarts may differ between hosts. Each process writes a random name; the first publishes all names until
    every process has accepted a list with its own, and the first name in the list becomes that of the group.
    """
    own = secrets.token_hex(8)
    store.set(f"member {rank}", own)
    keys = [f"member {other}" for other in range(size)]
    deadline = time.monotonic() + _CONNECT_SECONDS
    while time.monotonic() < deadline:
        if rank == 0 and store.check(keys):
            names = [store.get(key).decode() for key in keys]
            store.set("members", json.dumps(names))
            if store.check([f"{own} accepted by {name}" for name in names[1:]]):
                store.set(f"{own} complete", "")
                return own
        if rank != 0 and store.check(["members"]):
            names = json.loads(store.get("members"))
            if names[rank : rank + 1] == [own]:
                store.set(f"{names[0]} accepted by {own}", "")
                if store.check([f"{names[0]} complete"]):
                    return names[0]
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"not all of them have started within {_CONNECT_SECONDS:g} seconds")


def _join(timeout: float) -> Processes:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        raise InputError(
            f"tune: WORLD_SIZE is {launched()}, so tune makes the process group; got one already. Call "
            "torch.distributed.destroy_process_group() first, or start without torchrun."
        )
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    timeout = timeout if 0 < timeout < MAX_TIMEOUT else ProcessOptions.timeout  # `TuneConfig.resolved` raises the error
    try:
        store, rank, size = _rendezvous()
        store = dist.PrefixStore(f"skipkernels-{_group_name(store, rank, size)}", store)
        before = _connections()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"tune: the {launched()} processes can't connect: {first_line(error)}. Start them with torchrun."
        ) from error
    numbers = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", rank), ("GROUP_RANK", 0)))
    local_rank, host = numbers
    own = dist.PrefixStore("tune", store)
    processes = Processes(rank, size, local_rank=local_rank, host=host, store=own, timeout=timeout)
    processes.group = dist.group.WORLD
    processes.sockets = dict(_connections().items() - before.items())
    return processes


def _connections() -> dict[int, int]:
    """Connected sockets of this process, except those of the store: inode by file descriptor."""
    found = {}
    with contextlib.suppress(OSError):  # no such folder
        for name in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile, or a socket without a peer: it listens
                status = os.fstat(int(name))
                if stat.S_ISSOCK(status.st_mode) and not _is_of_store(int(name)):
                    found[int(name)] = status.st_ino
    return found


def _is_of_store(descriptor: int) -> bool:
    """Return True for a local socket, and for a connection to the store, which this process may hold itself."""
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        ends = connection.getsockname(), connection.getpeername()
    return any(not isinstance(end, tuple) or str(end[1]) == os.environ.get("MASTER_PORT") for end in ends)


def _causes(error: BaseException) -> list[BaseException]:
    """An error and its causes."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def _lost(error: BaseException) -> BaseException | None:
    """Return the error of a collective or of the store, if it is the error or one of its causes."""
    import torch.distributed as dist

    def lost(cause: BaseException) -> bool:
        return isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and "gloo" in str(cause).lower())

    return next(filter(lost, _causes(error)), None)


def _follows(error: BaseException) -> bool:
    """Return True if an error may be the consequence of one of another process."""
    from ...parallel import PeerError

    return _lost(error) is not None or any(isinstance(cause, (PeerError, ProcessError)) for cause in _causes(error))


def _types() -> dict[str, Callable[[str], BaseException]]:
    """Errors that stay of their type on other processes."""
    from ...store import StoreError

    kinds = (InputError, StoreError, MemoryError, FloatingPointError, OSError, ProcessError, KeyboardInterrupt)
    return {kind.__name__: kind for kind in kinds}


def _description(error: BaseException, rank: int) -> dict[str, Any]:
    types = _types()
    kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in types), None)
    message = str(error) if kind else f"Process {rank} raised {type(error).__name__}: {error}"
    found = {"type": kind, "message": message, "rank": rank}
    return found | {name: getattr(error, name, None) for name in ("argument", "number")}


def _rebuilt(described: dict[str, Any]) -> BaseException:
    error: Any = _types().get(described["type"], RuntimeError)(described["message"])
    error.reported = True
    for name in ("argument", "number"):
        if described[name] is not None:
            setattr(error, name, described[name])
    return error
