"""A training loop with accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from ..problems import Problem


def train(module: Any, problem: Problem, _: Path) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    optimizer, loader = problem.optimizer(module), DataLoader(problem.dataset, problem.batch_size)
    prepared, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    for images, labels in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(images, labels).loss)
            optimizer.step()
            optimizer.zero_grad()
