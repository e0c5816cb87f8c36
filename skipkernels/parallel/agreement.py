"""Agreement of processes: a difference between them, or an error of one, is raised on every process.

Without it the processes would wait for each other, or select different classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from .gathers import all_gather

_ERROR = -1  # in place of a number of images


def check_equal(digests: Mapping[str, str], group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise a ValueError that names the first difference, unless all processes have equal digests; collective."""
    own = torch.tensor([int(digest[:15], 16) for digest in digests.values()], device=device)
    for rank, other in enumerate(all_gather(own, group).tolist()):
        for name, digest, expected in zip(digests, other, own.tolist(), strict=True):
            if digest != expected:
                raise ValueError(
                    f"ShardedSkipCLIP: {name} must be equal on all processes of process_group; got different ones "
                    f"on processes {dist.get_rank(group)} and {rank}. Pass the same on every process."
                )


@contextmanager
def announced_errors(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Announce an error of this block to the other processes, which call `compare_calls`; collective if one occurs."""
    try:
        yield
    except Exception:
        all_gather(torch.tensor([_ERROR, 0, 0], device=device), group)
        raise


def compare_calls(call: str, count: int, state: bytes, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Return the number of images of each process, `count` on this one; collective.

    `call` is the name of the method and all arguments that must be equal; `state` what the next draw depends on.

    Raises:
        RuntimeError: On every process, if one has announced an error, or processes call different methods or would
            draw different classes.
    """
    own = [count, zlib.crc32(call.encode()), zlib.crc32(state)]
    messages: Tensor = all_gather(torch.tensor(own, device=device), group)  # [W, 3]
    counts = []
    for rank, (other_count, other_call, other_state) in enumerate(messages.tolist()):
        if other_count == _ERROR:
            raise RuntimeError(
                f"ShardedSkipCLIP: process {rank} of process_group refused its arguments of {call}. Its own error "
                "says why."
            )
        if other_call != own[1]:
            raise RuntimeError(
                f"ShardedSkipCLIP: process {rank} of process_group does not call {call}, as process "
                f"{dist.get_rank(group)} does. Call the same methods, with equal arguments, on all processes."
            )
        if other_state != own[2]:
            raise RuntimeError(
                f"ShardedSkipCLIP: clip.sampler of process {rank} of process_group has another state or other "
                f"options than that of process {dist.get_rank(group)}, so they would select different classes. Load a "
                "checkpoint and set options on every process, and call SkipCLIP equally often on each."
            )
        counts.append(other_count)
    return counts
