"""Registration: gradients by the names in two schemas, and calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from skipkernels.ops import registration
from skipkernels.ops.add_layer_norm import NormArguments, add_layer_norm_backward
from skipkernels.ops.sgd_momentum import Call, sgd_momentum_
from tests.ops.backends import Backend

LARGEST = 2**63 - 1


def step_at(offset: int) -> None:
    weight, number = torch.zeros(8, dtype=torch.bfloat16), torch.tensor(0.1)
    torch.ops.skipkernels.sgd_momentum_(
        [weight], [weight.clone()], [weight.clone()], number, number, number, torch.tensor(1), [offset], []
    )


def attend(heads: int = 2, offsets: tuple[int, ...] = (0, 6)) -> None:
    packed = torch.zeros(8, 24)
    torch.ops.skipkernels.shared_prefix_attention(packed, heads, 2, torch.tensor(offsets), LARGEST, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_at(-1), "offsets must be at least 0"),
        (lambda: step_at(LARGEST), "offsets must be at least 0"),
        (lambda: attend(heads=(2**64 + 2) // 3), "heads must divide W"),  # 3 · heads is 2 modulo 2⁶⁴
        (lambda: attend(offsets=(0, LARGEST, -LARGEST - 1, -1, 6)), "offsets must go from 0 to at most 6"),
    ],
    ids=["negative_offset", "largest_offset", "heads", "offsets"],
)
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_integers_that_overflow_are_refused(backend: Backend, call, message):
    """Direct calls; memory out of bounds would be read. `skipkernels.functional` refuses them with its own errors."""
    step_at(0), attend()
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


@pytest.fixture
def library(monkeypatch) -> Iterator[None]:
    """A library of its own for the operators of a test."""
    with torch.library._scoped_library(registration.NAMESPACE, "FRAGMENT") as library:
        monkeypatch.setattr(registration, "_library", library)
        monkeypatch.setattr(registration, "_definitions", dict(registration.definitions))
        yield


def define(schema: str, function, **options) -> torch._ops.OpOverload:
    return registration.define(schema, **(dict.fromkeys(("fallback", "fake", "launch"), function) | options))


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_gradients_are_found_by_name(library, trained):
    """Arguments in another order, options and results that are saved, and a flag with a default."""
    calls = []

    def backward(total, power, d_out, y, x, need_y, need_x, other=False):
        calls.append((power, total, need_x, need_y, other))
        return d_out * x**power, d_out * power * x ** (power - 1) * y

    of_all = define(
        "product_backward(Tensor total, int power, Tensor d_out, Tensor? y, Tensor x, bool need_y, bool need_x,"
        " bool other=False) -> (Tensor d_y, Tensor d_x)",
        backward,
    )
    operator = define(
        "product(Tensor x, int power, Tensor? y) -> (Tensor total, Tensor out)",
        lambda x, power, y: (x.sum(), x**power * y),
        backward=of_all,
    )
    x, y = (torch.randn(3).requires_grad_(need) for need in trained)
    total, out = operator(x, 3, y)
    assert not total.requires_grad
    leaves = [leaf for leaf in (x, y) if leaf.requires_grad]
    for ours, right in zip(
        torch.autograd.grad(out.sum(), leaves), torch.autograd.grad((x**3 * y).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, right)
    assert calls == [(3, total, *trained, False)]


def test_an_unknown_name_is_refused(library):
    of_all = define("half_backward(Tensor d_out, float scale) -> Tensor d_x", lambda d_out, scale: d_out)
    with pytest.raises(AssertionError, match="half_backward: scale is no name in "):
        define("half(Tensor x) -> Tensor out", lambda x: x / 2, backward=of_all)


@pytest.mark.parametrize(
    ("operator", "call"),
    [(sgd_momentum_, Call), (add_layer_norm_backward, NormArguments)],
    ids=["sgd_momentum_", "add_layer_norm_backward"],
)
def test_a_call_names_the_arguments_of_its_schema(operator, call):
    """Schemas that `arguments_of` cannot make, since types such as `Tensor(a!)[]` are not those of Python."""
    assert call._fields == tuple(argument.name for argument in operator._schema.arguments)


def test_gradients_are_allocated_by_name(library):
    operator = define(
        "pair_backward(Tensor d_out, Tensor x, Tensor y, Tensor z, bool need_y, bool need_z)"
        " -> (Tensor d_z, Tensor d_x, Tensor d_y)",
        None,
        fake=None,
    )
    x, y, z = (torch.empty(n, dtype=dtype, device="meta") for n, dtype in ((2, torch.half), (3, None), (4, None)))
    found = operator(x, x, y, z, False, True)
    assert [(each.shape, each.dtype) for each in found] == [((4,), z.dtype), ((2,), x.dtype), ((0,), y.dtype)]
