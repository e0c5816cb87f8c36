"""Settings of the published code of Skip Tuning: learning rates, their schedule, and prompt templates."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from .options import Protocol

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

BATCH_SIZE, MOMENTUM, WEIGHT_DECAY = 4, 0.9, 5e-4  # of SGD, in batches of one class


class Rates(NamedTuple):
    """Epochs and learning rates of a protocol."""

    epochs: int
    text_lr: float
    image_lr: float
    warmup_epochs: int
    warmup_lr: float


RATES: dict[Protocol, Rates] = {
    "base-to-new": Rates(20, 2e-5, 5e-6, 1, 1e-6),
    "cross-dataset": Rates(20, 1e-5, 1e-6, 1, 1e-8),
    "domain-generalization": Rates(20, 1e-5, 1e-6, 1, 1e-8),
    "few-shot": Rates(40, 1e-5, 1e-5, 0, 0.0),
}
_QUARTER = ("imagenet", "sun397", "food101")  # published with a quarter of the epochs


def rates(protocol: Protocol, dataset: str) -> Rates:
    """Return the published rates for a dataset of CoOp, by its name in `PAPER`, or for another one.

    >>> rates("few-shot", "dtd").epochs, rates("few-shot", "food101").epochs
    (40, 10)
    """
    of_protocol = RATES[protocol]
    return of_protocol._replace(epochs=of_protocol.epochs // 4) if dataset in _QUARTER else of_protocol


PHOTO = "a photo of a {}."

# Wu et al. 2025.
PAPER = {
    "imagenet": PHOTO,
    "caltech101": "itap of a {}.",
    "oxford_pets": "a bad photo of a {}, a type of pet.",
    "stanford_cars": "a photo of the {}, a type of car.",
    "oxford_flowers": "a close-up photo of a {}.",
    "food101": "a photo of the nice {}.",
    "fgvc_aircraft": "a bright photo of a {}, a type of aircraft.",
    "sun397": PHOTO,
    "dtd": "itap of a {}.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a {}, a type of sport.",
    "imagenetv2": PHOTO,
    "imagenet_sketch": "a sketch of a {}.",
    "imagenet_a": "a bad photo of a {}.",
    "imagenet_r": "a rendition of a {}.",
}
# Zhou et al. 2022.
COOP = {
    "imagenet": PHOTO,
    "caltech101": PHOTO,
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": PHOTO,
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "sun397": PHOTO,
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
    "imagenetv2": PHOTO,
    "imagenet_sketch": PHOTO,
    "imagenet_a": PHOTO,
    "imagenet_r": PHOTO,
}


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
    from torch.optim.lr_scheduler import LambdaLR

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
