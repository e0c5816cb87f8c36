"""Processes of a run that torchrun started: each has its share of the work, and the first writes and shows progress."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ...formatting import first_line
from ..data.base import InputError
from ..option_groups import ProcessOptions
from .errors import argument_error

if TYPE_CHECKING:
    import torch


class Processes:
    """Processes of a run. Without a group, size is 1 and the collectives return their input.

    The `first` process writes files and shows progress. An error of one process ends it, then torchrun ends the others.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local_rank: int = 0,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        self.rank, self.size, self.first, self.group = rank, size, rank == 0, group
        self._local_rank = local_rank

    def set_device(self, device: str) -> None:
        """Make the GPU of this process the current one, which "cuda" and "auto" name. Call it before using a GPU."""
        import torch

        if self.size == 1 or device == "cpu" or not torch.cuda.is_available():
            return
        if ":" in device:
            raise argument_error(
                "device", f"{device} is one GPU, and each of {self.size} processes uses its own; choose cuda."
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
        """Gather the rows [share, …] of each process to [count, …], in the order of ranks; collective."""
        from ...parallel import gather_rows

        if self.group is None:
            return rows
        return gather_rows(rows, [len(part) for part in self._shares(count)], self.group)

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
            dist.broadcast(whole, group=self.group, group_src=0)
            tensor.copy_(whole)

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """Return what the first process computes; collective."""
        import torch
        import torch.distributed as dist

        if self.group is None:
            return compute()
        found = [compute() if self.first else None]
        dist.broadcast_object_list(found, group=self.group, device=torch.device("cpu"), group_src=0)
        return found[0]

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """Run a block on the first process of each host before the others, which find its downloads; collective."""
        if self._local_rank != 0:
            self.sum([0])  # a barrier on the CPU: dist.barrier would use NCCL
        yield
        if self._local_rank == 0:
            self.sum([0])


ALONE = Processes()


def launched() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return True if this is the first of the processes that torchrun started, or the only one."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


def join(timeout: float = ProcessOptions.timeout) -> Processes:
    """Return the processes that torchrun started; makes the process group, unless there is one. Reads WORLD_SIZE."""
    import torch
    import torch.distributed as dist

    if launched() == 1:
        return ALONE
    if not dist.is_initialized():
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            reason = first_line(error).rstrip(".")
            raise InputError(
                f"tune: the {launched()} processes can't connect: {reason}. Start them with torchrun."
            ) from error
    rank = dist.get_rank()
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Processes(rank, dist.get_world_size(), local_rank=local_rank, group=dist.group.WORLD)
