"""Registration of gradients with and without the private names of torch._C, and direct calls of operators."""

from __future__ import annotations

import pytest
import torch

from skipkernels.ops import registration
from tests.ops.conftest import Backend

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


@pytest.mark.parametrize("hidden", [None, *registration.PRIVATE])
def test_differentiate_works_without_private_names(hidden, monkeypatch):
    name = f"twice_{hidden or 'with_all'}"
    with torch.library._scoped_library(registration.NAMESPACE, "FRAGMENT") as library, monkeypatch.context() as patch:
        patch.setattr(registration, "_library", library)
        operator = registration.define(
            f"{name}(Tensor x, Tensor factor, float unused) -> Tensor",
            fallback=lambda x, factor, unused: 2 * x * factor,
            fake=lambda x, factor, unused: torch.empty_like(x),
            launch=lambda x, factor, unused: 2 * x * factor,
        )
        with patch.context() as hide:
            if hidden is not None:
                hide.delattr(torch._C, hidden)
            registration.differentiate(
                operator,
                lambda ctx, d_out: (2 * d_out * ctx.saved_tensors[0], None),
                lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
            )
        x, factor = torch.ones(3, requires_grad=True), torch.tensor([1.0, 2.0, 3.0])
        operator(x, factor, 0.0).sum().backward()
        assert torch.equal(x.grad, 2 * factor)
        registration.definitions.pop(name)
