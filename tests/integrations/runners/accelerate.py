"""A training loop with accelerate."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from skipkernels import SkipCLIP

from ..problems import Problem


def train(clip: SkipCLIP, problem: Problem, _: Path) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    optimizer, loader = problem.optimizer(clip), DataLoader(problem.dataset, problem.batch_size)
    prepared, optimizer, loader = accelerator.prepare(clip, optimizer, loader)
    for images, labels in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(images, labels).loss)
            optimizer.step()
            optimizer.zero_grad()
