"""Classes shared out among the processes of a group: process r of P owns the classes c ≡ r (mod P)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .gathers import all_gather, gather_rows

_BACKENDS = ("gloo", "nccl")


class OwnSelection(NamedTuple):
    """The selected classes of one process."""

    class_ids: Tensor  # [K_r] int64, selected classes that this process owns, as indices of its own, ascending
    # [B] int64, positions of the labels of all images in `class_ids`, −1 if another process owns the class
    labels: Tensor
    positions: Tensor  # [K_r] int64, positions of these classes among the selected classes of all processes
    targets: Tensor  # [B] int64, positions of the labels among the selected classes of all processes
    kept: int  # K, number of selected classes of all processes


class ClassParallel:
    """Assignment of classes to processes, and the messages about classes; docs/many-processes.md lists them.

    A deep copy uses the same process group. `group` must use gloo or NCCL; `num_classes` is at least its size.

    Attributes:
        rank: r of this process in the group.
        size: P, number of processes.
    """

    def __init__(self, group: Any, num_classes: int, device: torch.device):
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
        self.group, self.num_classes = group, num_classes
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._check_number(num_classes)
        self._whole: tuple[Tensor, Tensor] | None = None  # argument and result of the last call of `class_embeddings`

    def _check_number(self, num_classes: int) -> None:
        if num_classes < self.size:
            raise ValueError(
                "ShardedSkipCLIP: process_group shares out the classes, so there must be at least as many classes as "
                f"processes; got C={num_classes} and {self.size} processes. Use fewer processes."
            )

    def __deepcopy__(self, memo: Any) -> ClassParallel:
        return self._with(self.num_classes)

    def with_classes(self, num_classes: int) -> ClassParallel:
        """Return the same processes for another number of classes."""
        self._check_number(num_classes)
        return self._with(num_classes)

    def _with(self, num_classes: int) -> ClassParallel:
        other = ClassParallel.__new__(ClassParallel)
        vars(other).update(vars(self) | {"_whole": None, "num_classes": num_classes})
        return other

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

    def gather_sizes(self, batch_size: int, call: str, device: torch.device, draws: bytes = b"") -> list[int]:
        """Return the number of images of each process, on the host; collective.

        `call` is the name of the method and all arguments that must be equal; `draws` is what the next draw depends on.

        Raises:
            RuntimeError: On every process, if processes call different methods or would draw different classes.
        """
        method, state = zlib.crc32(call.encode()), zlib.crc32(draws)
        own = torch.tensor([batch_size, method, state], device=device)
        messages: list[list[int]] = all_gather(own, self.group).tolist()
        for rank, (_, other_method, other_state) in enumerate(messages):
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

    # ---- classes -----------------------------------------------------------------------------------------------

    def gather_classes(self, own: Tensor) -> Tensor:
        """Gather rows [C/P, …] of own classes to [C, …] in the order of classes, without autograd; collective."""
        with torch.no_grad():
            by_rank = gather_rows(own, self.sizes, self.group)  # [C, …]: classes 0, P, 2P, …, then 1, P + 1, …
        whole = torch.empty_like(by_rank)
        for rank, rows in enumerate(by_rank.split(self.sizes)):
            whole[rank :: self.size] = rows
        return whole

    def class_embeddings(self, own: Tensor) -> Tensor:
        """Gather the class embeddings of all processes; collective unless `own` is the tensor of the previous call."""
        if self._whole is None or self._whole[0] is not own:
            self.gather_sizes(0, "class_embeddings", own.device)
            self._whole = own, self.gather_classes(own)
        return self._whole[1]

    def own_selection(self, selection: tuple[Tensor, Tensor]) -> OwnSelection:
        """Restrict a selection to the classes of this process; on a GPU their number needs a host sync."""
        class_ids, targets = selection  # [K], [B]
        owned = class_ids % self.size == self.rank  # [K]
        labels = torch.where(owned, owned.cumsum(0) - 1, -1)[targets]  # [K] -> [B]
        positions = owned.nonzero().flatten()  # [K_r]
        return OwnSelection(class_ids[positions] // self.size, labels, positions, targets, len(class_ids))
