"""Learning rates over the epochs."""

from __future__ import annotations

import math

import pytest
import torch

from skipkernels.tuner.schedule import cosine_with_warmup


def rates(lr: float, epochs: int, warmup_epochs: int, warmup_lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
    schedule = cosine_with_warmup(optimizer, epochs=epochs, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("lr", [2e-5, 5e-6, 4e-3])
@pytest.mark.parametrize(("epochs", "warmup_epochs"), [(1, 0), (4, 1), (20, 1), (20, 3), (40, 0)])
def test_a_constant_and_then_a_cosine_that_counts_the_warmup(lr, epochs, warmup_epochs):
    expected = [
        1e-6 if epoch < warmup_epochs else lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for epoch in range(epochs)
    ]
    assert rates(lr, epochs, warmup_epochs, 1e-6) == pytest.approx(expected, rel=1e-12)


def test_torchs_own_schedules_give_the_same():
    """Of the published configuration: the cosine goes on from where it would be without a warm-up."""
    from torch.optim.lr_scheduler import CosineAnnealingLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2e-5)
    cosine, expected = CosineAnnealingLR(optimizer, T_max=20), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert rates(2e-5, 20, 0, 0.0) == pytest.approx(expected, rel=1e-9)


def test_a_warmup_is_not_faster_than_the_rate_itself():
    assert rates(1e-6, 2, 1, 1e-3)[0] == 1e-6
    assert rates(0.0, 2, 1, 1e-3)[0] == 0.0


def test_every_group_has_its_own():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (2.0, 8.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = cosine_with_warmup(optimizer, epochs=2, warmup_epochs=1, warmup_lr=0.5)
    assert schedule.get_last_lr() == [0.5, 0.5]
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1.0, 4.0])
