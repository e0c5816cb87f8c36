"""Classes shared out among the processes of a group: process r of W owns the classes c ≡ r (mod W)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gathers import gather_rows


@dataclass(frozen=True)
class ClassShards:
    """The classes of each process; r is the rank of this one, W the number of processes, C that of the classes."""

    group: dist.ProcessGroup
    num_classes: int

    def __post_init__(self) -> None:
        if self.num_classes < self.size:
            raise ValueError(
                "ShardedSkipCLIP: process_group shares out the classes, so there must be at least as many classes as "
                f"processes; got C={self.num_classes} and {self.size} processes. Use fewer processes."
            )

    def __deepcopy__(self, memo: Any) -> ClassShards:
        return self  # a process group cannot be copied

    @property
    def rank(self) -> int:
        """r."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """W."""
        return dist.get_world_size(self.group)

    @property
    def owned(self) -> slice:
        """The classes that this process owns, among all classes."""
        return slice(self.rank, None, self.size)

    @property
    def sizes(self) -> list[int]:
        """Number of classes that each process owns."""
        return [len(range(rank, self.num_classes, self.size)) for rank in range(self.size)]

    def gather(self, own: Tensor) -> Tensor:
        """Gather rows [C/W, …] of own classes to [C, …] in the order of classes, without autograd; collective."""
        with torch.no_grad():
            by_rank = gather_rows(own, self.sizes, self.group)  # [C, …]: classes 0, W, 2W, …, then 1, W + 1, …
        whole = torch.empty_like(by_rank)
        for rank, rows in enumerate(by_rank.split(self.sizes)):
            whole[rank :: self.size] = rows
        return whole

    def find_own(self, class_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [n] of own classes among class ids, and their indices among own ones; on a GPU with a host sync."""
        positions = (class_ids % self.size == self.rank).nonzero().flatten()
        return positions, class_ids[positions] // self.size
