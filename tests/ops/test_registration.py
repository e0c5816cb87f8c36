"""Registration of gradients with and without the private names of torch._C."""

from __future__ import annotations

import pytest
import torch

from skipkernels.ops import registration


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
