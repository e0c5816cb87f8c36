"""Learning rate schedule."""

from __future__ import annotations

import pytest
import torch

from skipkernels.published import cosine_with_warmup


def rates(lr: float, epochs: int, warmup_epochs: int, warmup_lr: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=lr)
    schedule = cosine_with_warmup(optimizer, epochs=epochs, warmup_epochs=warmup_epochs, warmup_lr=warmup_lr)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


# Multiples of the rate in each epoch under the published `build_lr_scheduler` (WARMUP_RECOUNT = True).
PUBLISHED = {
    (20, 1): (0.05, 1.0, 0.993844, 0.975528, 0.945503, 0.904508, 0.853553, 0.793893, 0.726995, 0.654508, 0.578217, 0.5,
              0.421783, 0.345492, 0.273005, 0.206107, 0.146447, 0.095492, 0.054497, 0.024472),
    (5, 1): (0.05, 1.0, 0.904508, 0.654508, 0.345492),
    (4, 1): (0.05, 1.0, 0.853553, 0.5),
    (4, 2): (0.05, 0.05, 1.0, 0.853553),
    (3, 0): (1.0, 0.75, 0.25),
}  # fmt: skip


@pytest.mark.parametrize(("epochs", "warmup_epochs"), PUBLISHED)
def test_cosine_with_warmup_is_published(epochs, warmup_epochs):
    found = rates(2e-5, epochs, warmup_epochs, 1e-6)
    assert [rate / 2e-5 for rate in found] == pytest.approx(PUBLISHED[epochs, warmup_epochs], abs=1e-6)


def test_warmup_rate_is_at_most_lr():
    assert rates(1e-6, 2, 1, 1e-3)[0] == 1e-6
    assert rates(0.0, 2, 1, 1e-3)[0] == 0.0
