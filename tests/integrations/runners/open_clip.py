"""`open_clip_train.train.train_one_epoch`, with a caption for each image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skipkernels import SkipCLIP
from skipkernels.integrations.open_clip import ClassLoss, ClassModel

from ..problems import Problem


def train(clip: SkipCLIP, problem: Problem, _: Path) -> None:
    pairs = data(problem.images, problem.tokens[problem.labels], problem.batch_size)
    fit(ClassModel(clip), ClassLoss(), problem.optimizer(clip), pairs)


def fit(
    model: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Any,
    schedule: Callable[[int], float] | None = None,
    **options: Any,
) -> None:
    """Train any model with open_clip's trainer for an epoch."""
    args = arguments(skip_scheduler=schedule is None, **options)
    train_one_epoch(model, {"train": data}, loss, 0, optimizer, None, schedule, None, args)


def arguments(**options: Any) -> SimpleNamespace:
    """Arguments of the trainer, as its command line has them."""
    defaults: dict[str, Any] = {"device": "cpu", "precision": "fp32", "accum_freq": 1, "grad_clip_norm": None}
    defaults |= {"rank": 0, "world_size": 1, "batch_size": 2, "log_every_n_steps": 10**6, "epochs": 1}
    defaults |= {"skip_scheduler": True, "distributed": False, "val_frequency": 1, "zeroshot_frequency": 0}
    return SimpleNamespace(**(defaults | dict.fromkeys(("distill", "horovod", "wandb", "save_logs"), False) | options))


def data(images: Tensor, text: Tensor, batch_size: int) -> Any:
    """Batches (image, text) in order, with the attributes of open_clip's loaders.

    Its own module for them, `open_clip_train.data`, needs webdataset, which reads from the network.
    """
    loader: Any = DataLoader(TensorDataset(images, text), batch_size)
    loader.num_samples, loader.num_batches = len(images), len(loader)
    return SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)
