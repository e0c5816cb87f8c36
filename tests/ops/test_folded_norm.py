"""folded_norm_gradients against autograd of the norm and the projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from skipkernels.ops.row_sums import FOLDED_ROWS, column_sums, folded_norm_gradients
from skipkernels.testing import SLACK, relative_error
from tests.ops.conftest import GPU, INTERPRETED, Backend

# There are no C++ kernels.
pytestmark = pytest.mark.parametrize("backend", ["reference", INTERPRETED, GPU], indirect=True)


def vectors(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("N", "W"), [(3, 5), (FOLDED_ROWS + 1, 129), (2 * FOLDED_ROWS, 40), (192, 64)])
def test_gradients_equal_autograd(backend: Backend, N, W, dtype):
    """Weight and product in a dtype; the projection may be a part of a wider matrix."""
    backend.skip_unless_supported(dtype)
    x, weight, bias, gamma, beta, d_y = vectors(N, (7, W), (N, W + 3), (N,), (W,), (W,), (7, N))
    weight = weight.to(dtype)
    leaves = [t.requires_grad_() for t in (gamma, beta, weight[:, :W].double(), bias)]
    F.linear(F.layer_norm(x, (W,), gamma, beta, 1e-5), *leaves[2:]).backward(d_y)
    unit_gradient = (d_y.T @ F.layer_norm(x, (W,), eps=1e-5)).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rest = (t.detach().to(backend.device, wide) for t in (d_y.sum(dim=0), gamma, beta))
    d_weight, sums = folded_norm_gradients(weight.to(backend.device)[:, :W], unit_gradient.to(backend.device), *rest)
    assert d_weight.dtype == sums.dtype == wide
    found = [*column_sums([sums], wide).chunk(2), d_weight]
    for ours, leaf in zip(found, leaves, strict=False):
        # The product is rounded to its dtype.
        assert relative_error(ours.cpu(), leaf.grad) <= 2 * SLACK[dtype]


def test_gradients_are_rounded_like_those_of_the_reference(backend: Backend):
    arguments = [t.to(backend.device) for t in vectors(0, (70, 33), (70, 33), (70,), (33,), (33,), dtype=torch.float32)]
    d_weight, sums = folded_norm_gradients(*arguments)
    weight, unit_gradient, d_bias, gamma, beta = (t.double() for t in arguments)
    assert relative_error(d_weight, unit_gradient * gamma + d_bias[:, None] * beta) <= SLACK[torch.float32]
    exact = torch.cat([(weight * unit_gradient).sum(0), d_bias @ weight])
    assert relative_error(sums.double().sum(0), exact) <= SLACK[torch.float32]


def test_opcheck(backend: Backend):
    arguments = vectors(0, (5, 8), (5, 8), (5,), (8,), (8,), dtype=torch.float32)
    backend.opcheck(folded_norm_gradients, tuple(t.to(backend.device) for t in arguments))
