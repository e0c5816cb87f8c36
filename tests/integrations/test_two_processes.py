"""The trainers in two processes: with all classes kept, the weights are those of one process with the whole batch."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from bench.trainers import lightning
from bench.trainers.common import small_problem, trained
from tests.processes import by_two

STEPS, TOGETHER = 3, 4
TRAINERS = ("accelerate", "hugging_face", "lightning")  # Lightning last: it uses the process group of the others


def train_each(rank: int, folder: Path) -> dict[str, Tensor]:
    """Weights after training with each trainer, by its name."""
    return {name: train(name, TOGETHER // 2, folder, rank) for name in TRAINERS}


def train(name: str, batch_size: int, folder: Path, rank: int | None = None) -> Tensor:
    problem = small_problem(STEPS, batch_size=TOGETHER)._replace(batch_size=batch_size)
    clip = problem.implementations()["skipkernels"]()
    torch.manual_seed(0)
    if name == "lightning" and rank is not None:
        trainer = lightning.trainer(folder, devices=2, strategy=DDPStrategy(broadcast_buffers=False))
        sampler = DistributedSampler(problem.dataset, 2, rank, shuffle=False)  # Lightning's own shuffles
        trainer.fit(lightning.plug(clip, problem), DataLoader(problem.dataset, batch_size, sampler=sampler))
    else:
        importlib.import_module(f"bench.trainers.{name}").train(clip, problem, folder)
    return trained(clip)


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("both")
    return by_two(folder, train_each, folder / "output")


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_equal_one(both, tmp_path, name):
    problem = small_problem(STEPS, batch_size=TOGETHER)
    start, alone = trained(problem.implementations()["skipkernels"]()), train(name, TOGETHER, tmp_path)
    first, second = (each[name] for each in both)
    assert first.equal(second)
    moved = (alone - start).norm()
    assert (first - alone).norm() < 1e-4 * moved and moved > 0.1
