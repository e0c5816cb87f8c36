"""Backward of every operator: a second time, within autocast, and an error for the gradient of a gradient."""

from __future__ import annotations

import pytest
import torch

from bench.operators.record import SmallCall, small_call
from skipkernels import functional
from tests.ops.backends import Backend

DIFFERENTIABLE = [name for name in functional.__all__ if small_call(name).inputs]
# Its backward is the operator, so the gradient of a gradient exists: tests/ops/test_rotary_embedding.py.
ONCE = [name for name in DIFFERENTIABLE if name != "rotary_embedding"]


@pytest.fixture(params=DIFFERENTIABLE)
def call(request: pytest.FixtureRequest) -> SmallCall:
    return small_call(request.param)


def test_second_backward_gives_equal_gradients(backend: Backend, call):
    """The first one changes nothing that is saved, and autocast rounds nothing in the second."""
    call = call.on(backend.device)
    leaves = [x.requires_grad_() for x in call.inputs.values()]
    total = call.total(*leaves)
    right = torch.autograd.grad(total, leaves, retain_graph=True)
    with torch.autocast(backend.device.type, torch.bfloat16):
        ours = torch.autograd.grad(total, leaves)
    assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


@pytest.mark.parametrize("call", ONCE, indirect=True)
def test_double_backward_is_an_error(backend: Backend, call):
    call = call.on(backend.device)
    leaves = [x.requires_grad_() for x in call.inputs.values()]
    (gradient,) = torch.autograd.grad(call.total(*leaves), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"_backward: the gradient of a gradient is not implemented"):
        gradient.sum().backward()
