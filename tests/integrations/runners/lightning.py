"""`lightning.pytorch.Trainer`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from skipkernels import SkipCLIP
from skipkernels.integrations.lightning import SkipModule

from ..problems import Problem


def train(clip: SkipCLIP, problem: Problem, folder: Path) -> None:
    trainer(folder).fit(plug(clip, problem), DataLoader(problem.dataset, problem.batch_size))


def plug(clip: SkipCLIP, problem: Problem) -> SkipModule:
    """SkipCLIP as a `LightningModule`."""
    return SkipModule(clip, **problem.rates(), **problem.settings())


def trainer(folder: Path, **options: Any) -> Trainer:
    """A trainer that trains for an epoch."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder}
    return Trainer(**(quiet | defaults | options))
