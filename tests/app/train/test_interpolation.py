"""Interpolation of weights before and after training."""

from __future__ import annotations

import torch

from skipkernels.app.train.interpolation import Interpolation


def test_ends_are_exact():
    before, after = torch.tensor([1e8, 1.0]), torch.tensor([-0.1, 0.3])
    weight = before.clone()
    between = Interpolation([weight])
    weight.copy_(after)
    between.end()
    for alpha, expected in ((0.0, before), (1.0, after), (0.5, (before + after) / 2)):
        between.set(alpha)
        assert weight.equal(expected)
