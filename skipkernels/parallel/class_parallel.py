"""Classes shared out among the processes of a group: process r of W owns the classes c ≡ r (mod W)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..selection import ClassSelection
from .gathers import all_gather, gather_rows

_BACKENDS = ("gloo", "nccl")
# In place of a number of images.
_FAILED = -1  # also in place of a digest
_EVALUATES = -2


class OwnSelection(NamedTuple):
    """The selected classes of one process.

    Attributes:
        class_ids: [K_r] int64, as indices of its own classes, ascending.
        labels: [B] int64, positions of the labels of all images in `class_ids`, −1 if another process owns the class.
        positions: [K_r] int64, positions of these classes among the selected classes of all processes.
        targets: [B] int64, positions of the labels among the selected classes of all processes.
        kept: K, number of selected classes of all processes.
    """

    class_ids: Tensor
    labels: Tensor
    positions: Tensor
    targets: Tensor
    kept: int


class PeerError(RuntimeError):
    """Error for a step that another process could not take."""


class ClassParallel:
    """Ownership of classes, and the messages about them. A copy has the same processes.

    Args:
        group: The processes.
        num_classes: C, number of classes of the task.
        device: Device of the model.

    Attributes:
        rank: r of this process in the group.
        size: W, number of processes.

    Raises:
        TypeError: If `group` is not a process group.
        ValueError: If this process is not in the group, its backend is not gloo or NCCL, or C < W.
    """

    def __init__(self, group: Any, num_classes: int, device: torch.device):
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "SkipCLIP: process_group must be a torch.distributed.ProcessGroup that contains this process, such as "
                f"torch.distributed.group.WORLD after init_process_group; got {type(group).__name__}."
            )
        backend = dict(part.split(":") for part in str(dist.get_backend_config(group)).split(",")).get(device.type)
        if backend not in _BACKENDS:
            raise ValueError(
                f"SkipCLIP: process_group must have gloo or NCCL for tensors on {device.type}, where the model is; got "
                f"{backend}. Move the model to its device first, or pass another group."
            )
        self.group, self.num_classes = group, num_classes
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if num_classes < self.size:
            raise ValueError(
                "SkipCLIP: process_group shares out the classes, so there must be at least as many as processes; got "
                f"C={num_classes} and {self.size} processes. Use fewer processes."
            )
        self._whole: tuple[Tensor, Tensor] | None = None  # own class embeddings, and those of all classes

    def __deepcopy__(self, memo: Any) -> ClassParallel:
        other = ClassParallel.__new__(ClassParallel)
        vars(other).update(vars(self) | {"_whole": None})
        return other

    @property
    def owned(self) -> slice:
        """The classes of this process among all classes."""
        return slice(self.rank, None, self.size)

    # ---- agreement of processes --------------------------------------------------------------------------------

    def check_equal(self, digests: Sequence[tuple[str, str]], device: torch.device) -> None:
        """Raise a ValueError on every process unless all have equal digests, named in the message; collective.

        Args:
            digests: Names and hexadecimal digests, with the same names on every process.
            device: Device of the message.
        """
        own = torch.tensor([int(digest[:15], 16) for _, digest in digests], device=device)
        for rank, other in enumerate(all_gather(own, self.group).tolist()):
            if _FAILED in other:
                raise PeerError(f"SkipCLIP: process {rank} of process_group raised an error; see its output.")
            for (name, _), digest, expected in zip(digests, other, own.tolist(), strict=True):
                if digest != expected:
                    raise ValueError(
                        f"SkipCLIP: {name} must be equal on all processes of process_group; those of process {rank} "
                        f"are not those of process {self.rank}. Give every process the same."
                    )

    def report_error(self, device: torch.device, length: int = 2) -> None:
        """Send an error of this process in place of a message of `length` numbers, so that no other waits for it."""
        all_gather(torch.full((length,), _FAILED, device=device), self.group)

    def gather_sizes(self, batch_size: int, generator: torch.Generator, device: torch.device) -> list[int]:
        """Return the number of images of each process, on the host; collective.

        Raises:
            RuntimeError: On every process, if one reports an error or its generator has another state.
        """
        state = zlib.crc32(generator.get_state().numpy().tobytes())
        messages = self._announce(batch_size, state, device)
        for rank, (_, other_state) in enumerate(messages):
            if other_state != state:
                raise RuntimeError(
                    f"SkipCLIP: the generator of process {rank} of process_group has another state than that of "
                    f"process {self.rank}, so they would select other classes. Load a checkpoint on every process, and "
                    "call SkipCLIP equally often on each."
                )
        return [size for size, _ in messages]

    def _announce(self, batch_size: int, state: int, device: torch.device) -> list[list[int]]:
        """Exchange two numbers; raise on every process unless all train, or all evaluate."""
        messages: list[list[int]] = all_gather(torch.tensor([batch_size, state], device=device), self.group).tolist()
        for rank, (size, _) in enumerate(messages):
            if size == _FAILED:
                raise PeerError(f"SkipCLIP: process {rank} of process_group raised an error; see its output.")
            if (size == _EVALUATES) != (batch_size == _EVALUATES):
                doing = ["runs a training step", "gathers class embeddings"][size == _EVALUATES]
                raise RuntimeError(
                    f"SkipCLIP: process {rank} of process_group {doing}, and process {self.rank} does not. Train, and "
                    "evaluate, on all processes at once."
                )
        return messages

    # ---- classes -----------------------------------------------------------------------------------------------

    def gather_classes(self, own: Tensor) -> Tensor:
        """Gather rows [C/W, …] of own classes to [C, …] in the order of classes, without autograd; collective."""
        sizes = [len(range(rank, self.num_classes, self.size)) for rank in range(self.size)]
        with torch.no_grad():
            by_rank = gather_rows(own, sizes, self.group)
        whole = torch.empty_like(by_rank)
        for rank, rows in enumerate(by_rank.split(sizes)):
            whole[rank :: self.size] = rows
        return whole

    def class_embeddings(self, own: Tensor) -> Tensor:
        """Gather class embeddings; collective if `own` is not the tensor of the previous call."""
        if self._whole is None or self._whole[0] is not own:
            self._announce(_EVALUATES, 0, own.device)
            self._whole = own, self.gather_classes(own)
        return self._whole[1]

    def own_selection(self, selection: ClassSelection) -> OwnSelection:
        """Restrict a selection to own classes; on a GPU a host sync, for their number."""
        class_ids, targets = selection
        owned = class_ids % self.size == self.rank
        labels = torch.where(owned, owned.cumsum(0) - 1, -1)[targets]
        positions = owned.nonzero().flatten()
        return OwnSelection(class_ids[positions] // self.size, labels, positions, targets, len(class_ids))
