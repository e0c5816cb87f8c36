"""LSkipBoundary saves nothing for backward, passes no gradient, and bounds memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from skipkernels import LSkipBoundary


class Lower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.largest = 0

    def forward(self, inputs):
        self.largest = max(self.largest, len(inputs))
        return self.layers(inputs)


def test_boundary_value_and_no_gradient():
    lower, head, inputs = Lower(), nn.Linear(8, 3), torch.randn(5, 8, requires_grad=True)
    hidden = LSkipBoundary.apply(lower, inputs, 2)
    torch.testing.assert_close(hidden, lower(inputs))
    assert not hidden.requires_grad
    head(hidden).sum().backward()
    assert inputs.grad is None and all(p.grad is None for p in lower.parameters()) and head.weight.grad is not None


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 9])
def test_boundary_runs_at_most_a_chunk_at_once(batch):
    lower = Lower()
    hidden = LSkipBoundary.apply(lower, torch.randn(batch, 8), 3)
    assert hidden.shape == (batch, 8) and lower.largest <= 3


def test_boundary_saves_nothing_for_backward():
    lower, saved = Lower(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        LSkipBoundary.apply(lower, torch.randn(4, 8, requires_grad=True), 2)
        assert saved == []
        lower(torch.randn(4, 8))
    assert saved, "the hook sees what an ordinary call saves"


def test_boundary_under_autocast():
    lower = Lower()
    with torch.autocast("cpu", torch.bfloat16):
        assert LSkipBoundary.apply(lower, torch.randn(4, 8), 2).dtype == torch.bfloat16


def test_boundary_under_activation_checkpointing():
    lower, head, inputs = Lower(), nn.Linear(8, 3), torch.randn(4, 8)
    head(LSkipBoundary.apply(lower, inputs, 2)).square().sum().backward()
    expected, head.weight.grad = head.weight.grad, None
    checkpoint(lambda x: head(LSkipBoundary.apply(lower, x, 2)), inputs, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(head.weight.grad, expected)


@pytest.mark.slow
def test_boundary_under_torch_compile():
    lower, head, inputs = Lower(), nn.Linear(8, 3), torch.randn(4, 8)

    def step(x):
        return head(LSkipBoundary.apply(lower, x, 2)).square().sum()

    expected = step(inputs)
    compiled = torch.compile(step, backend="aot_eager")(inputs)
    torch.testing.assert_close(compiled, expected)
    compiled.backward()
    assert head.weight.grad is not None and lower.layers[0].weight.grad is None
