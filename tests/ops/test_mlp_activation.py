"""mlp_activation: the shared tests, and the error of every element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.operators.mlp_activation import eager
from skipkernels import reference
from skipkernels.functional import mlp_activation
from skipkernels.ops.mlp_activation import KINDS, Backward, mlp_activation_backward
from skipkernels.ops.row_sums import column_sums
from skipkernels.testing import SLACK
from tests.ops.backends import GPU, INTERPRETED, Backend, on_gpu
from tests.ops.harness import DTYPES, Case, Operator, shared_tests

ELEMENTWISE = KINDS[:3]  # the others join two numbers


def make(R, W, *, dtype, seed=0, kind="quick_gelu", bias=True, bias_dtype=None) -> Case:
    """W is the width of the result."""
    rng = torch.Generator().manual_seed(seed)
    width = W if kind in ELEMENTWISE else 2 * W
    inputs = {"x": (2 * torch.randn(R, width, generator=rng)).to(dtype)}
    vector = torch.randn(width, generator=rng).to(bias_dtype or dtype)
    inputs |= {"bias": vector} if bias else {}
    return Case({name: x.requires_grad_() for name, x in inputs.items()}, {"kind": kind})


OPERATOR = Operator(
    name="mlp_activation",
    make=make,
    eager=eager,
    sizes="R W",
    shapes=[
        (1, 1),
        (1, 7),
        (30, 33),  # one column more than two 512-bit vectors of fp32, which C++ processes together
        (9, 513),  # one column more than a chunk in C++, and than two blocks in Triton
        (33, 512),
        (129, 130),
        (7, 3072),
        (200, 768),
    ],
    small=(3, 33),
    large=[(788, 768), (3000, 100), (31, 4096)],
    features=("x",),
    variants=[{}, *({"kind": kind} for kind in KINDS[1:]), {"bias": False}, {"kind": "swiglu", "bias": False}],
    wide=[{"kind": kind, "bias_dtype": torch.float32} for kind in KINDS],
    empty=(0, 40),
    saves=lambda case: [],
    too_slow=lambda R, W: R * W > 100_000,
)
TestMlpActivation = shared_tests(OPERATOR)


def all_magnitudes(dtype: torch.dtype) -> Tensor:
    """Numbers of every magnitude and sign, with subnormal ones and 0; dense from −15 to 15."""
    tiny, largest = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max
    sizes = torch.logspace(torch.tensor(tiny).log2().item(), torch.tensor(largest).log2().item() - 1e-3, 500, 2.0)
    dense = torch.linspace(-15, 15, 8001)
    return torch.cat([-sizes, torch.tensor([0.0, -largest, largest]), sizes, dense]).to(dtype)


def value_and_slope(function, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x, kind=kind)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", [*ELEMENTWISE, "swiglu"])
@pytest.mark.parametrize("backend", ["cpp", INTERPRETED, GPU], indirect=True)
def test_every_element_error(backend: Backend, kind, dtype):
    """Bound the error of every element from −max to max, in roundings of its dtype; other tests bound a norm."""
    backend.skip_unless_supported(dtype)
    if backend.name == "interpreter" and dtype == torch.float16:
        pytest.skip("covered by fp32: the interpreter computes fp16 in fp32")
    x = gate = all_magnitudes(dtype)  # [n]
    gated, largest = kind == "swiglu", 1
    if gated:  # a row is a gate and a number up to 3, by which it is multiplied
        gate, largest = gate[:, None], 3
        x = torch.cat([gate, torch.linspace(-largest, largest, len(gate))[:, None].to(dtype)], dim=1)  # [n, 2]
    out, d_x = (y.cpu().double() for y in value_and_slope(mlp_activation, x.to(backend.device), kind))
    right, d_right = value_and_slope(reference.mlp_activation, x.double(), kind)
    half_step, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    least = max(least, 2e-38)  # a step of subnormal numbers; smaller results may be flushed to 0
    # fp32: six roundings. 16-bit types: the rounding of the result, and 15 % more for the arithmetic in fp32. The
    # product of a gate is one more.
    rounding = half_step * ((8 if gated else 6) if dtype == torch.float32 else (1.2 if gated else 1.15))
    # An error of erf is multiplied by x. The slope is a sum of terms of size 1, which may cancel.
    terms = largest * (gate.double().abs().clamp(max=15) * 2**-22 + least)
    cancelled = largest * (2**-22 if dtype == torch.float32 else 3e-5)
    finite = (right.abs() <= torch.finfo(dtype).max).flatten()
    assert ((out - right).abs() <= rounding * right.abs() + terms)[finite].all()
    assert ((d_x - d_right).abs() <= rounding * d_right.abs() + 4 * terms + cancelled)[finite].all()


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_relative_precision_where_the_result_vanishes(kind):
    """The relative error stays small down to results of 1e-37, where 1 + erf(x/√2) would cancel to 0."""
    x = torch.linspace(-12.7, -1, 1001)
    wide = x.double()
    gate = {
        "quick_gelu": torch.sigmoid(1.702 * wide),
        "gelu": torch.special.erfc(wide * -(0.5**0.5)) / 2,
        "gelu_tanh": torch.sigmoid((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)),
    }
    right = wide * gate[kind]
    normal = right.abs() > 1e-37
    error = ((mlp_activation(x, kind=kind).double() - right) / right)[normal].abs().max().item()
    assert error < 87 * 2**-22, error  # 2⁻²² for each unit of the argument of exp, which is above −87


@pytest.mark.parametrize(("kind", "factor"), [("swiglu", 1), ("quick_gelu", 1.702)])
@pytest.mark.parametrize("backend", ["cpp", INTERPRETED], indirect=True)
def test_a_subnormal_gate_is_not_zero(backend: Backend, kind, factor):
    """exp(−u) is a number up to u = −88.72; the sigmoid is subnormal from −87.34, its product with u is not."""
    u = torch.linspace(-88.7, -87, 18) / factor
    x = torch.stack([u, torch.ones(18)], dim=1) if kind == "swiglu" else u[:, None]
    expected = reference.mlp_activation(x, kind=kind)
    assert (expected < 0).all()
    # The step of subnormal numbers is 6e-7 of the smallest gate; the error of exp is 2⁻²⁴ for each unit of −u.
    torch.testing.assert_close(mlp_activation(x, kind=kind), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("backend", ["cpp", INTERPRETED, GPU], indirect=True)
def test_infinity_and_nan_follow_the_formula(backend: Backend, kind):
    for dtype in backend.dtypes:
        x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=dtype, device=backend.device)
        out, d_x = value_and_slope(mlp_activation, x, kind)
        assert out[0] == torch.inf and out[1:3].isnan().all() and out[3].isfinite()
        assert d_x[:3].isnan().all() and d_x[3].isfinite()


@pytest.mark.parametrize("backend", ["cpp", INTERPRETED, GPU], indirect=True)
def test_gated_infinity_and_nan_follow_the_formula(backend: Backend):
    for dtype in backend.dtypes:
        gate, linear = [torch.inf, -torch.inf, torch.nan, 1, 1, 1], [2, 2, 2, torch.inf, torch.nan, 2]
        pairs = torch.tensor([gate, linear], dtype=dtype, device=backend.device).T
        out, d_x = value_and_slope(mlp_activation, pairs, "swiglu")
        assert out[[0, 3], 0].tolist() == [torch.inf] * 2 and out[[1, 2, 4]].isnan().all() and out[5].isfinite()
        assert d_x[:, 0].isfinite().tolist() == [False] * 5 + [True]
        assert d_x[:, 1].isfinite().tolist() == [False] * 3 + [True] * 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(33, 513), on_gpu(891, 2048)], ids=OPERATOR.id_of)
def test_backward_of_a_block(backend: Backend, shape, kind):
    """With the recomputed result; kernels of Triton leave the gradient of the bias to `column_sums`, if they may."""
    for dtype in backend.dtypes:
        x, bias = (x.detach() for x in OPERATOR.case(shape, backend.device, kind=kind, dtype=dtype).inputs.values())
        out = mlp_activation(x, bias, kind)
        plain = Backward(torch.ones_like(out), x, bias, KINDS.index(kind), need_x=True, need_bias=True)
        d_x, d_bias, *_ = mlp_activation_backward(*plain)
        whole, part = (
            mlp_activation_backward(*plain._replace(need_out=True, partial=partial)) for partial in (False, True)
        )
        for found in (whole, part):
            assert torch.equal(found[0], d_x)
            torch.testing.assert_close(found[2], out, rtol=SLACK[dtype], atol=SLACK[dtype])
        assert torch.equal(whole[1], d_bias) and whole[3].numel() == 0
        if backend.name in ("cpp", "reference"):
            assert torch.equal(part[1], d_bias) and part[3].numel() == 0
        else:  # fp32 sums of numbers near 1, then rounded: a step of the dtype
            assert part[1].numel() == 0
            sums = column_sums([part[3]], torch.float32).to(dtype)
            torch.testing.assert_close(sums, d_bias, rtol=4 * SLACK[dtype], atol=2e-6 * shape[0])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_opcheck_of_backward_in_each_dtype(backend: Backend, bias):
    """Results that are not needed are empty, in the dtype that a compiled call expects."""
    for dtype in backend.dtypes:
        inputs = OPERATOR.case((3, 10), backend.device, dtype=dtype, bias=bias).inputs
        x, vector = inputs["x"].detach(), inputs["bias"].detach() if bias else None
        call = Backward(torch.ones_like(x), x, vector, kind=0, need_x=True, need_bias=bias)
        backend.opcheck(mlp_activation_backward, tuple(call), compiled=False)
