"""SkipCLIP in a training loop with accelerate."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

from bench.trainers import accelerate as runner
from bench.trainers.common import Problem, compare, small_problem, trained

STEPS, SAVED = 6, 4  # of the only epoch


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_problem()


def short(problem: Problem, **changes) -> Problem:
    images = STEPS * problem.batch_size
    return problem._replace(images=problem.images[:images], labels=problem.labels[:images], **changes)


def test_losses_and_weights_of_the_plain_module(problem):
    records, difference = compare(runner.train, problem)
    assert difference.is_small
    ours, naive = records["skipkernels"], records["naive"]
    assert ours.losses[-1] < ours.losses[0] / 2 and ours.saved_bytes < naive.saved_bytes / 2


def prepare(accelerator: Accelerator, problem: Problem):
    clip = problem.implementations()["skipkernels"]()
    loader = DataLoader(problem.dataset, problem.batch_size, shuffle=True)
    return accelerator.prepare(clip, problem.optimizer(clip), loader)


def test_resume_within_an_epoch(problem, tmp_path):
    same_order = DataLoaderConfiguration(use_seedable_sampler=True)  # else the order of an epoch is not saved
    problem, accelerator = short(problem, keep_ratio=0.5), runner.accelerator_on_cpu(dataloader_config=same_order)

    def run(clip, optimizer, batches) -> list[float]:
        losses = []
        for number, (images, labels) in enumerate(batches, STEPS - len(batches) + 1):
            loss = clip(images, labels).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if number == SAVED and len(batches) == STEPS:
                accelerator.save_state(str(tmp_path))
        return losses

    clip, optimizer, loader = prepare(accelerator, problem)
    losses, expected = run(clip, optimizer, loader), clip.state_dict()

    accelerator.free_memory()
    clip, optimizer, loader = prepare(accelerator, problem)
    with torch.no_grad():
        for parameter in clip.trainable_parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    assert run(clip, optimizer, accelerator.skip_first_batches(loader, SAVED)) == losses[SAVED:]
    state = clip.state_dict()
    assert [name for name in expected if not state[name].equal(expected[name])] == []


def test_accumulated_gradients_of_a_larger_batch(problem, monkeypatch):
    """With all classes kept, the mean of two batches' gradients is that of both together."""
    weights = []
    for batches in (1, 2):
        torch.manual_seed(0)
        part = short(problem, batch_size=4 // batches)
        accelerator = runner.accelerator_on_cpu(gradient_accumulation_steps=batches)
        monkeypatch.setattr(runner, "accelerator_on_cpu", lambda accelerator=accelerator: accelerator)
        clip = part.implementations()["skipkernels"]()
        runner.train(clip, part, None)
        monkeypatch.undo()
        weights.append(trained(clip))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
