"""All-reduce of gradients, for training without `DistributedDataParallel`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtypes import wide_dtype
from .sharded_clip import ShardedSkipCLIP, check_sharded

_BUCKET_BYTES = 32 << 20  # largest message, except for a larger gradient


@torch.no_grad()
def all_reduce_gradients(clip: ShardedSkipCLIP) -> None:
    """Average the gradients of a ShardedSkipCLIP over the processes of its `process_group`, in place; collective.

    Call it on every process between `backward` and the optimizer's step, unless `DistributedDataParallel` does this.
    With gradient accumulation, call it once, after the last backward. Sums are in fp32, or fp64 for fp64 gradients. A
    gradient that is None on this process counts as zero.
    """
    check_sharded("all_reduce_gradients", clip)
    group, gradients = clip.process_group, []
    for parameter in clip.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:  # every process must send the same buckets
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        # bf16 and fp16 would round at each addition
        flat = torch.cat([gradient.to(wide_dtype(gradient.dtype)).flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split gradients into lists of one dtype and at most `_BUCKET_BYTES`; a larger gradient is a list of its own."""
    bucket: list[Tensor] = []
    nbytes = 0
    for gradient in gradients:
        added = gradient.numel() * wide_dtype(gradient.dtype).itemsize
        if bucket and (wide_dtype(bucket[0].dtype) != wide_dtype(gradient.dtype) or nbytes + added > _BUCKET_BYTES):
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(gradient)
        nbytes += added
    if bucket:
        yield bucket
