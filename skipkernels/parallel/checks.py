"""Checks of ShardedSkipCLIP: of its arguments, and that its processes agree.

A difference between processes, or an error of one, is raised on every process. Without it the processes would wait for
each other, or select different classes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..towers.base import Tower, UnsupportedModel
from .gathers import all_gather

if TYPE_CHECKING:
    from .sharded_clip import ShardedSkipCLIP

_BACKENDS = ("gloo", "nccl")
_ERROR = -1  # in place of a number of images

# ---- arguments -------------------------------------------------------------------------------------------------------


def check_group(group: Any, model: Any) -> None:
    """Raise unless a process group can send tensors on the device of a model."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "ShardedSkipCLIP: process_group must be a torch.distributed.ProcessGroup that contains this process, "
            f"such as torch.distributed.group.WORLD after init_process_group; got {type(group).__name__}."
        )
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if parameter is None:
        return  # SkipCLIP refuses such a model
    kind = parameter.device.type
    backend = dict(part.split(":") for part in str(dist.get_backend_config(group)).split(",")).get(kind)
    if backend not in _BACKENDS:
        raise ValueError(
            f"ShardedSkipCLIP: process_group must have gloo or NCCL for tensors on {kind}, where the model is; got "
            f"{backend}. Move the model to its device first, or pass another group."
        )


def refuse_batch_norms(*towers: Tower) -> None:
    """Raise if a module above the cut is a batch norm other than `SyncBatchNorm`."""
    parts = [part for tower in towers for part in tower.upper_parts() if isinstance(part, nn.Module)]
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            raise UnsupportedModel(
                "ShardedSkipCLIP: batch norms above the cut must use the images of all processes; got "
                f"{type(module).__name__}. Convert the model with torch.nn.SyncBatchNorm.convert_sync_batchnorm, on a "
                "GPU, or raise skip_layers."
            )


def refuse_soft_labels(labels: Any, return_logits: bool = False) -> None:
    """Raise for what needs the embeddings of all selected classes."""
    if return_logits or (isinstance(labels, Tensor) and labels.ndim == 2):
        raise ValueError(
            "ShardedSkipCLIP: labels must be class ids [B] and return_logits False, since no process has the "
            "embeddings of all selected classes. Use clip.eval(), or SkipCLIP on one process."
        )


# ---- agreement of processes ------------------------------------------------------------------------------------------


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
def announced_errors(clip: ShardedSkipCLIP) -> Iterator[None]:
    """Raise an error of this block, which checks arguments, on every process; `compare_calls` must follow."""
    try:
        yield
    except Exception:
        all_gather(torch.tensor([_ERROR, 0, 0], device=clip.prototypes.device), clip.process_group)
        raise


def gather_sizes(clip: ShardedSkipCLIP, call: str, count: int, *, draws: bool = False) -> list[int]:
    """Number of images of each process, `count` on this one, in a call that has some; see `compare_calls`."""
    sizes = compare_calls(clip, call, count, draws=draws)
    if sum(sizes) == 0:
        raise ValueError("ShardedSkipCLIP: a batch must have at least one image on one of the processes; got none.")
    return sizes


def compare_calls(clip: ShardedSkipCLIP, call: str, count: int = 0, *, draws: bool = False) -> list[int]:
    """Compare the calls of all processes, and return the `count` of each; collective.

    `call` is the name of the method and all arguments that must be equal. `draws` if it selects classes.

    Raises:
        RuntimeError: On every process, if one has announced an error, or processes call different methods or would
            draw different classes.
    """
    group, state = clip.process_group, clip.sampler.identity() if draws else b""
    own = [count, zlib.crc32(call.encode()), zlib.crc32(state)]
    messages: Tensor = all_gather(torch.tensor(own, device=clip.prototypes.device), group)  # [W, 3]
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
