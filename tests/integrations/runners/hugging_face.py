"""`transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from skipkernels import SkipCLIP
from skipkernels.integrations import hugging_face

from ..problems import Problem


def train(clip: SkipCLIP, problem: Problem, folder: Path) -> None:
    Trainer(clip, train_dataset=problem.dataset, **plug(problem, folder)).train()


def plug(problem: Problem, folder: Path, **options: Any) -> dict[str, Any]:
    """Arguments of the trainer for a SkipCLIP."""
    args = arguments(problem, folder, **options)
    return hugging_face.trainer_arguments(args, **problem.rates(), **problem.settings())


def arguments(problem: Problem, folder: Path, **options: Any) -> TrainingArguments:
    """Arguments of a training without evaluation."""
    defaults = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": problem.batch_size,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "ddp_broadcast_buffers": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(str(folder), **(defaults | options))
