"""Checks of the arguments of ShardedSkipCLIP."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..towers.base import Tower, UnsupportedModel

_BACKENDS = ("gloo", "nccl")


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
