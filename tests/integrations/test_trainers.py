"""Every trainer: the weights of a plain loop, and of one process."""

from __future__ import annotations

import importlib
import runpy
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from skipkernels.integrations.open_clip import ClassLoss, ClassModel
from tests.integrations.problems import small_problem, trained
from tests.integrations.runners import lightning, open_clip
from tests.processes import run_in_processes

STEPS, TOGETHER = 3, 4
TRAINERS = ("accelerate", "hugging_face", "open_clip", "lightning")  # the first one makes the process group
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TRAINERS)
def test_weights_of_a_loop(name, tmp_path):
    """On the batches that the trainer passes, which it may have shuffled."""
    runner, problem = importlib.import_module(f"tests.integrations.runners.{name}"), small_problem()
    ours, plain, batches = problem.clip(), problem.clip(), []
    start = trained(plain)
    ours.register_forward_pre_hook(lambda _, args, named: batches.append([*args, *named.values()]), with_kwargs=True)
    runner.train(ours, problem, tmp_path)
    problem.loop(plain, batches)
    assert len(batches) == problem.steps
    assert trained(ours).equal(trained(plain)) and not trained(plain).equal(start)


# ---- two processes -----------------------------------------------------------------------------------------------


def train_each(rank: int, folder: Path) -> dict[str, Tensor]:
    """Weights after training with each trainer, by its name."""
    return {name: train(name, TOGETHER // 2, folder, rank) for name in TRAINERS}


def train(name: str, batch_size: int, folder: Path, rank: int | None = None) -> Tensor:
    problem = small_problem(STEPS, batch_size=TOGETHER)._replace(batch_size=batch_size)
    clip = problem.clip()
    torch.manual_seed(0)
    if name == "open_clip" and rank is not None:
        mine = torch.arange(STEPS * TOGETHER).view(STEPS, 2, -1)[:, rank].flatten()
        data = open_clip.data(problem.images[mine], problem.tokens[problem.labels[mine]], batch_size)
        optimizer = problem.optimizer(clip)
        model = DistributedDataParallel(ClassModel(clip))
        open_clip.fit(model, ClassLoss(), optimizer, data, distributed=True, rank=rank, world_size=2)
    elif name == "lightning" and rank is not None:
        trainer = lightning.trainer(folder, devices=2, strategy=DDPStrategy(broadcast_buffers=False))
        sampler = DistributedSampler(problem.dataset, 2, rank, shuffle=False)  # Lightning's own shuffles
        trainer.fit(lightning.plug(clip, problem), DataLoader(problem.dataset, batch_size, sampler=sampler))
    else:
        importlib.import_module(f"tests.integrations.runners.{name}").train(clip, problem, folder)
    return trained(clip)


def test_two_processes_equal_one(tmp_path):
    """With all classes kept, the weights are those of one process with the whole batch."""
    both = run_in_processes(2, tmp_path, train_each, tmp_path / "output")  # once, for all trainers
    for name in TRAINERS:
        problem = small_problem(STEPS, batch_size=TOGETHER)
        start, alone = trained(problem.clip()), train(name, TOGETHER, tmp_path / name)
        first, second = (each[name] for each in both)
        assert first.equal(second), name
        moved = (alone - start).norm()
        # Gradients of half a batch are added in another order: 16 steps of 2⁻²³ in each update.
        assert (first - alone).norm() < 1e-4 * moved and moved > 0.1, name


# ---- examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINERS)
def test_example(name, tmp_path):
    tune = runpy.run_path(str(ROOT / "examples" / f"trainer_{name}.py"))["tune"]
    torch.manual_seed(0)  # the order of the images
    before, after = tune(*([] if name == "accelerate" else [str(tmp_path)]), epochs=2, max_classes=80)
    assert 0.5 < before < after
