"""Average of gradients over processes, for training without `DistributedDataParallel`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from ..clip import SkipCLIP

_BUCKET = 32 << 20  # bytes of a message


@torch.no_grad()
def all_reduce_gradients(clip: SkipCLIP) -> None:
    """Average the gradients of a SkipCLIP over the processes of its `process_group`, in place; collective.

    Call it on every process between `backward` and the optimizer's step, unless `DistributedDataParallel` does this.
    With gradient accumulation, call it once, after the last backward. The mean is summed at least in fp32. A parameter
    without gradient on this process counts as zero.
    """
    group = clip.process_group
    if group is None:
        raise ValueError("all_reduce_gradients: clip must have a process_group; got None. Pass it to SkipCLIP.")
    parameters = [parameter for parameter in clip.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for bucket in _buckets(gradients):
        mean = torch.cat([gradient.to(_wide(gradient)).flatten() for gradient in bucket])
        dist.all_reduce(mean, group=group)
        mean /= dist.get_world_size(group)
        for gradient, part in zip(bucket, mean.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _wide(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split into lists of one dtype of at most `_BUCKET` bytes, or of one gradient."""
    bucket: list[Tensor] = []
    nbytes = 0
    for gradient in gradients:
        added = gradient.numel() * _wide(gradient).itemsize
        if bucket and (_wide(bucket[0]) != _wide(gradient) or nbytes + added > _BUCKET):
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(gradient)
        nbytes += added
    if bucket:
        yield bucket
