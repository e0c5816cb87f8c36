"""Classes shared out among the processes of a group: process r of P owns the classes c ≡ r (mod P)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gathers import all_gather, gather_rows

_BACKENDS = ("gloo", "nccl")
_ERROR = -1  # in place of a number of images


def check_group(group: Any, device: torch.device) -> None:
    """Raise unless a process group can send tensors on a device."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "ShardedSkipCLIP: process_group must be a torch.distributed.ProcessGroup that contains this process, "
            f"such as torch.distributed.group.WORLD after init_process_group; got {type(group).__name__}."
        )
    backend = dict(part.split(":") for part in str(dist.get_backend_config(group)).split(",")).get(device.type)
    if backend not in _BACKENDS:
        raise ValueError(
            f"ShardedSkipCLIP: process_group must have gloo or NCCL for tensors on {device.type}, where the model "
            f"is; got {backend}. Move the model to its device first, or pass another group."
        )


@dataclass(frozen=True)
class ClassParallel:
    """Assignment of classes to processes, and the messages of ShardedSkipCLIP; docs/many-processes.md lists them."""

    group: dist.ProcessGroup
    num_classes: int

    def __post_init__(self) -> None:
        if self.num_classes < self.size:
            raise ValueError(
                "ShardedSkipCLIP: process_group shares out the classes, so there must be at least as many classes as "
                f"processes; got C={self.num_classes} and {self.size} processes. Use fewer processes."
            )

    def __deepcopy__(self, memo: Any) -> ClassParallel:
        return self  # a process group cannot be copied

    @property
    def rank(self) -> int:
        """r of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """P, number of processes."""
        return dist.get_world_size(self.group)

    @property
    def owned(self) -> slice:
        """The classes that this process owns, among all classes."""
        return slice(self.rank, None, self.size)

    @property
    def sizes(self) -> list[int]:
        """Number of classes that each process owns."""
        return [len(range(rank, self.num_classes, self.size)) for rank in range(self.size)]

    def own_rows(self, sizes: Sequence[int]) -> slice:
        """The rows of this process among those of all, `sizes` of them on each."""
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    # ---- agreement of processes --------------------------------------------------------------------------------

    def check_equal(self, digests: Sequence[tuple[str, str]], device: torch.device) -> None:
        """Raise a ValueError on every process unless all have equal digests, named in the message; collective."""
        own = torch.tensor([int(digest[:15], 16) for _, digest in digests], device=device)
        for rank, other in enumerate(all_gather(own, self.group).tolist()):
            for (name, _), digest, expected in zip(digests, other, own.tolist(), strict=True):
                if digest != expected:
                    raise ValueError(
                        f"ShardedSkipCLIP: {name} must be equal on all processes of process_group; got different ones "
                        f"on processes {self.rank} and {rank}. Pass the same on every process."
                    )

    def announce_error(self, call: str, device: torch.device) -> None:
        """Take part in `gather_sizes`, with an error in place of a number of images; collective."""
        self._gather_numbers(_ERROR, call, b"", device)

    def gather_sizes(self, batch_size: int, call: str, device: torch.device, sampler: bytes = b"") -> list[int]:
        """Return the number of images of each process, on the host; collective.

        `call` is the name of the method and all arguments that must be equal; `sampler` what the next draw depends on.

        Raises:
            RuntimeError: On every process, if one has announced an error, or processes call different methods or would
                draw different classes.
        """
        (_, method, state), messages = self._gather_numbers(batch_size, call, sampler, device)
        for rank, (size, other_method, other_state) in enumerate(messages):
            if size == _ERROR:
                raise RuntimeError(
                    f"ShardedSkipCLIP: process {rank} of process_group refused its arguments of {call}. Its own error "
                    "says why."
                )
            if other_method != method:
                raise RuntimeError(
                    f"ShardedSkipCLIP: process {rank} of process_group does not call {call}, as process {self.rank} "
                    "does. Call the same methods, with equal arguments, on all processes."
                )
            if other_state != state:
                raise RuntimeError(
                    f"ShardedSkipCLIP: clip.sampler of process {rank} of process_group has another state or other "
                    f"options than that of process {self.rank}, so they would select different classes. Load a "
                    "checkpoint and set options on every process, and call SkipCLIP equally often on each."
                )
        return [size for size, _, _ in messages]

    def _gather_numbers(
        self, batch_size: int, call: str, sampler: bytes, device: torch.device
    ) -> tuple[list[int], list[list[int]]]:
        """Return three numbers of this process, and of each."""
        own = [batch_size, zlib.crc32(call.encode()), zlib.crc32(sampler)]
        return own, all_gather(torch.tensor(own, device=device), self.group).tolist()

    # ---- classes -----------------------------------------------------------------------------------------------

    def gather_classes(self, own: Tensor) -> Tensor:
        """Gather rows [C/P, …] of own classes to [C, …] in the order of classes, without autograd; collective."""
        with torch.no_grad():
            by_rank = gather_rows(own, self.sizes, self.group)  # [C, …]: classes 0, P, 2P, …, then 1, P + 1, …
        whole = torch.empty_like(by_rank)
        for rank, rows in enumerate(by_rank.split(self.sizes)):
            whole[rank :: self.size] = rows
        return whole

    def own_of(self, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [n] of own classes among class ids, and their indices among own ones; on a GPU with a host sync."""
        positions = (class_ids % self.size == self.rank).nonzero().flatten()
        return positions, class_ids[positions] // self.size
