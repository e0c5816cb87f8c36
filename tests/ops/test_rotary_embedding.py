"""rotary_embedding: the shared tests, timm's rotation, and what is copied."""

from __future__ import annotations

import pytest
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from skipkernels.functional import rotary_embedding
from tests.ops.backends import Backend
from tests.ops.harness import Case, Operator, shared_tests


def make(N, T, H, E, *, dtype, seed=0, interleaved=True, copied=1) -> Case:
    """N sequences of T tokens, the first of which is not rotated; H heads to rotate, and some to copy."""
    rng = torch.Generator().manual_seed(seed)
    angles = 4 * torch.randn(T, E // 2, generator=rng, dtype=torch.float64)
    angles[0] = 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(N * T, (H + copied) * E, generator=rng).to(dtype).requires_grad_()
    tables = {"cos": angles.cos().to(wide), "sin": angles.sin().to(wide)}
    return Case({"x": x, **tables}, {"heads": H, "interleaved": interleaved})


def eager(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool = True) -> Tensor:
    """timm's rotation, of [n, H, T, E]."""
    T, E = cos.shape[0], 2 * cos.shape[1]
    if interleaved:
        table = torch.cat([sin.repeat_interleave(2, dim=1), cos.repeat_interleave(2, dim=1)], dim=1)
    else:
        table = torch.cat([sin, sin, cos, cos], dim=1)
    parts = x.unflatten(1, (-1, E)).unflatten(0, (-1, T)).transpose(1, 2)
    rotated = apply_rot_embed_cat(parts[:, :heads], table, half=not interleaved)
    return torch.cat([rotated, parts[:, heads:]], dim=1).transpose(1, 2).reshape(x.shape)


OPERATOR = Operator(
    name="rotary_embedding",
    make=make,
    eager=eager,
    sizes="N T H E",
    shapes=[
        (1, 1, 1, 2),
        (2, 3, 5, 6),
        (2, 7, 3, 34),  # one pair more than a 512-bit vector of fp32
        (3, 5, 4, 80),
        (2, 9, 2, 66),  # one pair more than C++ processes together
        (1, 2, 1, 2050),  # one pair more than fits a tile of Triton's
        (4, 50, 12, 64),
    ],
    small=(2, 3, 2, 6),
    large=[(4, 197, 12, 64), (3, 1000, 2, 16)],
    features=("x",),
    variants=[{}, {"interleaved": False}, {"copied": 0}, {"interleaved": False, "copied": 3}],
    empty=(0, 3, 2, 6),
    saves=lambda case: [],
    too_slow=lambda N, T, H, E: N * T * H * E > 100_000,
    gradients=[["x"]],
)
TestRotaryEmbedding = shared_tests(OPERATOR)


@pytest.mark.parametrize("interleaved", [True, False])
def test_inverse_restores_the_rows(backend: Backend, interleaved):
    inputs, options = OPERATOR.case((2, 9, 3, 80), backend.device, interleaved=interleaved)
    x, cos, sin = (each.detach() for each in inputs.values())
    rotate = torch.ops.skipkernels.rotary_embedding
    found = rotate(rotate(x, cos, sin, 3, interleaved, False), cos, sin, 3, interleaved, True)
    torch.testing.assert_close(found, x)
    assert torch.equal(rotate(x, cos, sin, 3, interleaved, True), rotary_embedding(x, cos, -sin, **options))


def test_heads_behind_are_copied_to_the_bit(backend: Backend):
    """Also infinity and NaN, and numbers beside them."""
    for dtype in backend.dtypes:
        inputs, options = OPERATOR.case((2, 3, 2, 6), backend.device, dtype=dtype, copied=2)
        x = inputs["x"].detach()
        x[1, 12:20] = torch.tensor([torch.inf, 1, -torch.inf, -0.0, torch.nan, 2, 3, torch.inf])
        out = rotary_embedding(**(inputs | {"x": x}), **options)
        assert torch.equal(out[:, 12:].nan_to_num(7.25), x[:, 12:].nan_to_num(7.25)) and out[:, :12].isfinite().all()


def test_nan_and_infinity_stay_in_their_pair(backend: Backend):
    for value in (torch.nan, torch.inf):
        for interleaved, pair in ((True, [4, 5]), (False, [1, 4])):
            inputs, options = OPERATOR.case((1, 3, 2, 6), backend.device, interleaved=interleaved)
            x = inputs["x"].detach()
            x[2, 4] = value
            out = rotary_embedding(**(inputs | {"x": x}), **options)
            assert (~out.isfinite()).nonzero().tolist() == [[2, column] for column in pair]


def test_gradient_of_the_gradient(backend: Backend):
    """Backward is the operator: it is differentiable too."""
    if torch.float64 not in backend.dtypes:
        pytest.skip("in fp64")
    inputs, options = OPERATOR.case((2, 3, 2, 6), backend.device, dtype=torch.float64)
    x, cos, sin = inputs.values()
    assert torch.autograd.gradgradcheck(lambda x: rotary_embedding(x, cos, sin, **options).square(), x)
