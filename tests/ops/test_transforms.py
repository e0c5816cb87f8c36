"""The operators under torch.func (grad, vmap of grad), backward a second time, and errors for double backward."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from bench.operators.record import SmallCall, small_call
from skipkernels import functional, reference
from tests.ops.conftest import Backend

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


DIFFERENTIABLE = [name for name in functional.__all__ if small_call(name).inputs]
# Its backward is the operator, so the gradient of a gradient exists: tests/ops/test_rotary_embedding.py.
ONCE = [name for name in DIFFERENTIABLE if name != "rotary_embedding"]


@pytest.fixture(params=DIFFERENTIABLE)
def call(request: pytest.FixtureRequest) -> SmallCall:
    return small_call(request.param)


def test_grad_is_that_of_backward(backend: Backend, call):
    if backend.device.type != "cpu":
        pytest.skip("the rules are those of the dispatcher, whatever the device")
    everyone = tuple(range(len(call.inputs)))
    leaves = [x.clone().requires_grad_() for x in call.inputs.values()]
    backward = torch.autograd.grad(call.total(*leaves), leaves)
    exact = grad(lambda *inputs: call.total(*inputs, module=reference), everyone)(*call.inputs.values())
    for ours, same, right in zip(grad(call.total, everyone)(*call.inputs.values()), backward, exact, strict=True):
        assert torch.equal(ours, same)
        assert torch.allclose(ours, right, atol=1e-4, rtol=1e-4)


def test_inputs_outside_the_transform_are_recorded(call):
    """Forward is recorded at each level: by torch.func for the first input, and by autograd for all."""
    leaves = [x.clone().requires_grad_() for x in call.inputs.values()]
    total, _ = torch.func.vjp(lambda x: call.total(x, *leaves[1:]), leaves[0])
    right = torch.autograd.grad(call.total(*leaves), leaves)
    for ours, same in zip(torch.autograd.grad(total, leaves), right, strict=True):
        assert torch.equal(ours, same)


def test_vmap_is_a_loop(call):
    first, *rest = call.inputs.values()
    of_one = grad(lambda x: call.total(x, *rest))
    batch = torch.stack([first, 2 * first])
    assert torch.equal(vmap(of_one)(batch), torch.stack([of_one(x) for x in batch]))


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


@pytest.mark.parametrize("call", ONCE, indirect=True)
def test_double_grad_is_an_error(call):
    first, *rest = call.inputs.values()
    with pytest.raises(RuntimeError, match=r"_backward: the gradient of a gradient is not implemented"):
        grad(lambda x: grad(call.total)(x, *rest).sum())(first)
