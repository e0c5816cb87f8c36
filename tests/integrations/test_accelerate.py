"""SkipCLIP in a training loop with accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

from tests.integrations.problems import Problem, small_problem
from tests.integrations.runners import accelerate as runner

STEPS, SAVED = 6, 4  # of an epoch


def prepare(accelerator: Accelerator, problem: Problem):
    clip = problem.implementations()["skipkernels"]()
    loader = DataLoader(problem.dataset, problem.batch_size, shuffle=True)
    return accelerator.prepare(clip, problem.optimizer(clip), loader)


def test_resume_within_the_second_epoch(tmp_path):
    same_order = DataLoaderConfiguration(use_seedable_sampler=True)  # else the order of an epoch is not saved
    problem, accelerator = (
        small_problem(STEPS)._replace(keep_ratio=0.5),
        runner.accelerator_on_cpu(dataloader_config=same_order),
    )

    def run(clip, optimizer, batches, epoch=1) -> list[float]:
        losses = []
        for number, (images, labels) in enumerate(batches, STEPS - len(batches) + 1):
            loss = clip(images, labels).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if epoch == 1 and number == SAVED and len(batches) == STEPS:
                accelerator.save_state(str(tmp_path))
        return losses

    clip, optimizer, loader = prepare(accelerator, problem)
    run(clip, optimizer, loader, epoch=0)
    losses, expected = run(clip, optimizer, loader), clip.state_dict()

    accelerator.free_memory()
    clip, optimizer, loader = prepare(accelerator, problem)
    with torch.no_grad():
        for parameter in clip.trainable_parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    loader.set_epoch(1)
    assert run(clip, optimizer, accelerator.skip_first_batches(loader, SAVED)) == losses[SAVED:]
    state = clip.state_dict()
    assert [name for name in expected if not state[name].equal(expected[name])] == []
