"""Learning rate schedule: constant warm-up, then a cosine."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_with_warmup(optimizer: Optimizer, *, epochs: int, warmup_epochs: int, warmup_lr: float) -> LambdaLR:
    """Return a scheduler that is stepped once per epoch.

        lr(e) = min(lr, warmup_lr)                                    for e < warmup_epochs
        lr(e) = lr · (1 + cos(π · (e − warmup_epochs) / epochs)) / 2   otherwise; e counts from 0

    Args:
        optimizer: Optimizer; each group has its own learning rate `lr`.
        epochs: Number of epochs, warm-up included.
        warmup_epochs: Number of epochs at the warm-up rate.
        warmup_lr: Warm-up rate of all groups.

    Source: Wu et al., CVPR 2025. The cosine starts after the warm-up, as in Dassl with `WARMUP_RECOUNT = True`.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2.0)
        >>> schedule = cosine_with_warmup(optimizer, epochs=4, warmup_epochs=1, warmup_lr=0.5)
        >>> for _ in range(4):
        ...     optimizer.step(); print(round(schedule.get_last_lr()[0], 3)); schedule.step()
        0.5
        2.0
        1.707
        1.0
    """
    return LambdaLR(
        optimizer,
        [
            partial(_factor, epochs=epochs, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr, base_lr=group["lr"])
            for group in optimizer.param_groups
        ],
    )


def _factor(epoch: int, *, epochs: int, warmup_epochs: int, warmup_lr: float, base_lr: float) -> float:
    if epoch < warmup_epochs:
        return min(1.0, warmup_lr / base_lr) if base_lr > 0 else 1.0
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / epochs))
