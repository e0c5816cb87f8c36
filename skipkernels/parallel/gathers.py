"""Gathers of tensors from all processes of a group, with exact gradients; and batches without images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..dtypes import wide_dtype


def gather_rows(rows: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Gather rows [b, …] of each process, `sizes` of them, to [B, …] in the order of ranks; collective.

    Processes with fewer rows pad them, and the padding is dropped. In backward, gradients of all processes are summed
    by a reduce-scatter, at least in fp32: the result is the gradient of the sum of the losses of all processes.
    """
    return _GatherRows.apply(rows, list(sizes), group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group, ctx.dtype = sizes, group, rows.dtype
        longest = max(sizes)
        gathered = all_gather(_with_zero_rows(rows, longest), group)
        if min(sizes) == longest:
            return gathered.flatten(0, 1)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None, None]:
        longest, own = max(ctx.sizes), ctx.sizes[dist.get_rank(ctx.group)]
        wide = d_gathered.to(wide_dtype(ctx.dtype))  # W roundings to bf16 would add up
        parts = torch.stack([_with_zero_rows(part, longest) for part in wide.split(ctx.sizes)])
        return reduce_scatter(parts, ctx.group)[:own].to(ctx.dtype), None, None


def own_rows(sizes: Sequence[int], group: dist.ProcessGroup) -> slice:
    """Rows of this process among those of all, as `gather_rows` orders them."""
    rank = dist.get_rank(group)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def gather_shares(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather a tensor [...] of each process to [W, ...] in the order of ranks; collective.

    For a loss that every process computes from the result. Backward sends nothing: each process has the gradient of its
    own share already. It is multiplied by W, so that the mean over processes of the gradients of a parameter, as
    `DistributedDataParallel` computes it, is the gradient of the loss.
    """
    return _GatherShares.apply(share, group)


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(share, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_gathered: Tensor) -> tuple[Tensor, None]:
        return len(d_gathered) * d_gathered[dist.get_rank(ctx.group)], None


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather a tensor [...] of the same shape on each process to [W, ...], without autograd."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    # PyTorch 2.13 renames the collective, and warns if the old name is used.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(out.view(-1), x.detach().contiguous().view(-1), group=group)
    return out


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum part r of [W, ...] over the processes, and return it on process r."""
    out = parts.new_empty(parts.shape[1:])
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    collective(out.view(-1), parts.view(-1), group=group)
    return out


def _with_zero_rows(rows: Tensor, length: int) -> Tensor:
    if len(rows) == length:
        return rows
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])


# ---- empty batches ---------------------------------------------------------------------------------------------------


def filled(*batches: Any) -> tuple[Any, ...]:
    """Return batches; if all are empty, a row of zeros in place of each, so that gradients are zeros, not None."""
    if not all(isinstance(x, Tensor) and x.ndim and len(x) == 0 for x in batches):
        return batches
    return tuple(x.new_zeros(1, *x.shape[1:]) for x in batches)
