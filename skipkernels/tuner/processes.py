"""Processes of a run that torchrun started: the first writes and the others wait; an error of one is raised on all."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..data.base import InputError
from .errors import argument_error

if TYPE_CHECKING:
    import torch

_TIMEOUT = timedelta(minutes=10)  # of a collective: longer than an evaluation and a checkpoint
_POLL_SECONDS = 0.05
_LAG_SECONDS = 3.0  # in which the process that failed reports its error, after others have noticed
_END_SECONDS = 15.0  # in which the first process ends its run folder after an error; torchrun kills after 30 s
_ERROR, _END = "error", "end"


class ProcessError(RuntimeError):
    """Error for a process of the run that ended without a report, or that cannot be reached."""


class Processes:
    """Processes of a run. By default there is only this one.

    Without a group all methods are those of a single process, at no cost.

    Args:
        rank: Number of this process.
        size: Number of processes.
        local_rank: Number of this process on its host.
        host: Number of the host.
        store: Key-value store that the processes share.

    Attributes:
        first: True on the process that writes files and shows progress.
        group: Process group, or None.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, local_rank: int = 0, host: int = 0, store: Any = None):
        self.rank, self.size, self.first = rank, size, rank == 0
        self.group: torch.distributed.ProcessGroup | None = None
        self._local_rank, self._host, self._store = local_rank, host, store

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
        """Items of this process among `count`: consecutive, and one more on the first processes if they don't fit."""
        return self._shares(count)[self.rank]

    def _shares(self, count: int) -> list[range]:
        size, longer = divmod(count, self.size)
        starts = [rank * size + min(rank, longer) for rank in range(self.size + 1)]
        return [range(start, stop) for start, stop in zip(starts, starts[1:], strict=False)]

    def gather(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Gather rows of the `share` of each process to [count, …]; collective."""
        from ..parallel import gather_rows

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

    def from_first(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a value, of which JSON has the type, that the first process computes; the others wait for it."""
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

    def meet(self, name: str) -> None:
        """Wait for all processes, however long they take. Collectives have a timeout."""
        if self.size > 1:
            self._store.set(f"{name}, process {self.rank}", "")
            for rank in range(self.size):
                self._await(f"{name}, process {rank}")

    # ---- errors ------------------------------------------------------------------------------------------------

    def _await(self, key: str, seconds: float = float("inf")) -> None:
        """Wait until a key is set; raise a ProcessError if a process fails meanwhile."""
        began = time.monotonic()
        while not self._store.check([key]):
            if not key.startswith((_ERROR, _END)) and self._store.check([_ERROR]):
                raise ProcessError("tune: another process raised an error.")  # replaced by that error
            if time.monotonic() - began > seconds:
                return
            time.sleep(_POLL_SECONDS)

    def first_error(self, error: BaseException) -> BaseException:
        """Return the first error of all processes, which becomes this one if there was none."""
        follows = _follows(error)
        if _lost(error):
            reason = " ".join(str(error).split()).partition(". ")[0]
            error = ProcessError(
                f"tune: process {self.rank} of {self.size} lost the connection to another, which was killed, or does "
                f"not answer. Continue with `resume=True` from the last complete epoch. ({reason})"
            )
        try:
            if follows:
                self._await(_ERROR, _LAG_SECONDS)
            own = json.dumps(_description(error, self.rank))
            kept = self._store.compare_set(_ERROR, "", own)
            return error if kept.decode() == own else _rebuilt(json.loads(kept))
        except RuntimeError:  # the store has ended, with the process or launcher that held it
            return error

    def leave_after_error(self) -> None:
        """Leave the group, so that no other process waits for this one, and let the first end its run folder."""
        import torch.distributed as dist

        with contextlib.suppress(RuntimeError, ValueError):
            if self.group is not None:
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


ALONE = Processes()
_joined: Processes | None = None
_numbers = itertools.count()


def launched() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return True if this is the first of the processes that torchrun started, or the only one."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
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
    processes = _join()
    _joined = processes
    try:
        yield processes
        processes.sum([0])  # no process leaves before all have ended: the first may hold the store
    except BaseException as error:
        with _without_signals():
            first = processes.first_error(error)
            processes.leave_after_error()
        if first is error:
            raise
        raise first from error
    else:
        import torch.distributed as dist

        dist.destroy_process_group()
    finally:
        _joined = None


@functools.cache
def _rendezvous() -> Any:
    """Return the store, rank and number of processes. Made once: without torchrun the first process holds the store."""
    import torch.distributed as dist

    return next(dist.rendezvous("env://", timeout=_TIMEOUT))


def _join() -> Processes:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        raise InputError(
            f"tune: WORLD_SIZE is {launched()}, so tune makes the process group; got one already. Call "
            "torch.distributed.destroy_process_group() first, or start without torchrun."
        )
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    number = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}-{next(_numbers)}"  # the store may stay the same
    try:
        store, rank, size = _rendezvous()
        store = dist.PrefixStore(f"skipkernels-{number}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ProcessError(
            f"tune: the {launched()} processes can't connect: {reason}. Start them with torchrun."
        ) from error
    numbers = (int(os.environ.get(name, default)) for name, default in (("LOCAL_RANK", rank), ("GROUP_RANK", 0)))
    local_rank, host = numbers
    processes = Processes(rank, size, local_rank=local_rank, host=host, store=dist.PrefixStore("tune", store))
    processes.group = dist.group.WORLD
    return processes


@contextlib.contextmanager
def _without_signals() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM: the launcher sends them to all processes after the first error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _lost(error: BaseException) -> bool:
    """Return True for an error of a collective or of the store."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _follows(error: BaseException) -> bool:
    """Return True if an error may be the consequence of one of another process."""
    from ..parallel import PeerError

    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return any(_lost(cause) or isinstance(cause, (PeerError, ProcessError)) for cause in causes)


def _types() -> dict[str, Callable[[str], BaseException]]:
    """Errors that stay of their type on other processes."""
    from ..store import StoreError

    kinds = (InputError, StoreError, MemoryError, FloatingPointError, OSError, ProcessError, KeyboardInterrupt)
    return {kind.__name__: kind for kind in kinds}


def _description(error: BaseException, rank: int) -> dict[str, Any]:
    types = _types()
    kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in types), None)
    message = str(error) if kind else f"tune: process {rank} raised {type(error).__name__}: {error}"
    found = {"type": kind, "message": message, "rank": rank}
    return found | {name: getattr(error, name, None) for name in ("argument", "number")}


def _rebuilt(described: dict[str, Any]) -> BaseException:
    error: Any = _types().get(described["type"], RuntimeError)(described["message"])
    error.reported = True
    for name in ("argument", "number"):
        if described[name] is not None:
            setattr(error, name, described[name])
    return error
