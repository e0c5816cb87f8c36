"""Classes shared out among the processes of a group, and logits over all of them.

Process r of W owns the classes c ≡ r (mod W). No message of an evaluation holds [B, C] or [C, D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..retrieval import largest, top_k_logits
from .gathers import all_gather, gather_rows, own_rows


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


# ---- evaluation ------------------------------------------------------------------------------------------------------


def sharded_logits(image: Tensor, text: Tensor, sizes: Sequence[int], shards: ClassShards) -> Tensor:
    """Logits [b, C] of the images of this process over the classes of all; collective.

    Each process sends every other process the logits [b, C/W] of that process's images for its own classes. `image` is
    [B, D], scaled embeddings of all images, `sizes` of them on each process; `text` [C/W, D], own classes.
    """
    sent = image.new_empty(shards.size, max(sizes), max(shards.sizes))  # padded: parts of one size
    for part, rows in zip(sent, image.split(list(sizes)), strict=True):
        part[: len(rows), : len(text)] = rows @ text.T
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=shards.group)
    logits = image.new_empty(sizes[shards.rank], shards.num_classes)
    for rank, (part, owned) in enumerate(zip(received, shards.sizes, strict=True)):
        logits[:, rank :: shards.size] = part[: len(logits), :owned]
    return logits


def sharded_top_k(
    image: Tensor, text: Tensor, k: int, sizes: Sequence[int], shards: ClassShards
) -> tuple[Tensor, Tensor]:
    """The k largest logits [b, k] of the images of this process, and their classes; collective; see `sharded_logits`.

    Each process sends the k best of its classes for the images of all processes: [B, k] logits and class ids.
    """
    # 1. The k best own classes, for the images of all processes: [B, width]; padding is sorted behind every class
    width = min(k, max(shards.sizes))
    logits, positions = top_k_logits(image, text, min(k, len(text)))
    class_ids = positions * shards.size + shards.rank
    missing = width - logits.shape[1]
    logits = pad(logits, (0, missing), value=-torch.inf)
    class_ids = pad(class_ids, (0, missing), value=shards.num_classes)
    # 2. The candidates of all processes, for the images of this one: [b, W · width]
    rows = own_rows(sizes, shards.group)
    logits = torch.cat(all_gather(logits, shards.group).unbind(), 1)[rows]
    class_ids = torch.cat(all_gather(class_ids, shards.group).unbind(), 1)[rows]
    # 3. The k best of them: [b, k]
    class_ids, order = class_ids.sort(dim=1)  # so that a lower position is a lower class among equal logits
    found, positions = largest(logits.gather(1, order), k)
    return found, class_ids.gather(1, positions)
