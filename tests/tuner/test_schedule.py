"""Learning rate schedule."""

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
def test_cosine_with_warmup_formula(lr, epochs, warmup_epochs):
    expected = [
        1e-6 if epoch < warmup_epochs else lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        for epoch in range(epochs)
    ]
    assert rates(lr, epochs, warmup_epochs, 1e-6) == pytest.approx(expected, rel=1e-12)


def test_cosine_matches_torch():
    """Matches the published configuration, where the cosine counts warm-up epochs."""
    from torch.optim.lr_scheduler import CosineAnnealingLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2e-5)
    cosine, expected = CosineAnnealingLR(optimizer, T_max=20), []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert rates(2e-5, 20, 0, 0.0) == pytest.approx(expected, rel=1e-9)


def test_warmup_rate_is_at_most_lr():
    assert rates(1e-6, 2, 1, 1e-3)[0] == 1e-6
    assert rates(0.0, 2, 1, 1e-3)[0] == 0.0


def test_schedule_per_group():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in (2.0, 8.0)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    schedule = cosine_with_warmup(optimizer, epochs=2, warmup_epochs=1, warmup_lr=0.5)
    assert schedule.get_last_lr() == [0.5, 0.5]
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1.0, 4.0])
