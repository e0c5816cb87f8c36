"""add_layer_norm: the shared tests, also as RMSNorm, several dtypes in one call, and backward for a fused block."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.operators.add_layer_norm import eager
from skipkernels.functional import add_layer_norm, add_rms_norm
from skipkernels.ops.add_layer_norm import Backward, BackwardResults, add_layer_norm_backward
from skipkernels.ops.add_layer_norm import add_layer_norm as operator
from skipkernels.ops.row_sums import column_sums
from skipkernels.testing import SLACK, relative_error
from tests.ops.backends import Backend, on_gpu
from tests.ops.harness import Case, Operator, shared_tests


def make(R, W, *, dtype, seed=0, weight_dtype=None, residual=True, mean=3.0, **options) -> Case:
    """Rows of different means and sizes."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64)

    inputs = {"x": (mean + normal(R, W) * torch.linspace(0.5, 2, R)[:, None]).to(dtype)}
    if residual:
        inputs["residual"] = normal(R, W).to(options.get("out_dtype", dtype))
    else:
        options["residual"] = None
    inputs |= {name: normal(W).to(weight_dtype or dtype) for name in ("weight", "bias")}
    return Case({name: x.requires_grad_() for name, x in inputs.items()}, options)


def saves(case: Case) -> list[int]:
    """Two numbers for each row; hidden is a result, and without a residual it is x."""
    rows = case.inputs["x"].shape[0]
    return [rows, rows, *([case.inputs["x"].numel()] if "residual" in case.inputs else [])]


OPERATOR = Operator(
    name="add_layer_norm",
    make=make,
    eager=eager,
    sizes="R W",
    shapes=[
        (1, 3),
        (1, 7),
        (30, 33),  # one column more than two 512-bit vectors of fp32, which C++ processes together
        (13, 127),
        (3, 64),
        (33, 512),
        (9, 768),
        (5, 1000),
        (17, 1025),  # one more than a tile of Triton's
        (2, 4096),
        (2, 4100),  # wider than the Triton kernels support
        (257, 100),
        (200, 768),
    ],
    small=(3, 33),
    large=[(788, 768), (3000, 100), (131, 4096)],
    features=("x", "residual"),
    variants=[{}, {"residual": False}],
    wide=[{"weight_dtype": torch.float32}],
    empty=(0, 40),
    results=("hidden", "normed"),
    saves=saves,
    too_slow=lambda R, W: R * W > 100_000,
    gradients=[["x", "residual"], ["weight"], ["bias"]],  # one for both summands
)

TestAddLayerNorm = shared_tests(OPERATOR)


def make_rms(R, W, **options) -> Case:
    case = make(R, W, **options)
    return case._replace(inputs={name: x for name, x in case.inputs.items() if name != "bias"})


def eager_rms(x, residual, weight, eps=1e-6):
    hidden = x if residual is None else x + residual
    wide = hidden.to(weight.dtype)
    return hidden, F.rms_norm(wide, wide.shape[-1:], weight, eps).to(x.dtype)


RMS = dataclasses.replace(
    OPERATOR,
    name="add_rms_norm",
    make=make_rms,
    eager=eager_rms,
    shapes=[(1, 3), (30, 33), (33, 512), (17, 1025), (200, 768)],
    large=[(131, 4096)],
    saves=lambda case: saves(case)[1:],  # no mean
    gradients=[["x", "residual"], ["weight"]],
)
TestAddRmsNorm = shared_tests(RMS)

TWO_DTYPES = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32),
]


def ids_of(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(dtype)[6:] for dtype in dtypes)


@pytest.mark.parametrize("dtypes", TWO_DTYPES, ids=ids_of)
@pytest.mark.parametrize("shape", [(1, 7), (13, 127), (70, 768)], ids=OPERATOR.id_of)
def test_several_dtypes(backend: Backend, shape, dtypes):
    """The residual stream, and the dtype of the products beside it: results are rounded once."""
    for dtype in dtypes:
        backend.skip_unless_supported(dtype)
    stream, product = dtypes
    case = OPERATOR.case(shape, backend.device, dtype=stream, weight_dtype=torch.float32, out_dtype=product)

    def of_operator(x, residual, weight, bias, out_dtype):  # accepts more pairs than the public function
        return operator(x, residual, weight, bias, 1e-5, out_dtype)[:2]

    ours = OPERATOR.run(add_layer_norm if stream == torch.float32 else of_operator, case)
    theirs = OPERATOR.run(OPERATOR.reference, case)
    exact = OPERATOR.truth(case._replace(options={}))
    expected = [stream, product, stream, product, torch.float32, torch.float32]
    assert [x.dtype for x in ours.values()] == [x.dtype for x in theirs.values()] == expected
    for name, right in exact.items():
        error, allowed = (relative_error(x[name], right) for x in (ours, theirs))
        assert error <= allowed + SLACK[ours[name].dtype], f"{name}: {error:.2e} against the reference's {allowed:.2e}"


each_dtypes = pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), *TWO_DTYPES], ids=ids_of)
each_norm = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
each_shape = pytest.mark.parametrize("shape", [(1, 100), (70, 100), on_gpu(891, 512)], ids=OPERATOR.id_of)


def backward_of_a_block(backend: Backend, shape, rms, dtypes) -> Backward:
    """Arguments for all that a block needs: d_x twice, normed, and sums over rows."""
    for dtype in dtypes:
        backend.skip_unless_supported(dtype)
    stream, product = dtypes
    case = OPERATOR.case(shape, backend.device, dtype=stream, weight_dtype=torch.float32, out_dtype=product)
    x, residual, weight, bias = (x.detach() for x in case.inputs.values())
    if rms:
        bias = None
    hidden, normed, mean, rstd = operator(x, residual, weight, bias, 1e-5, product, rms)
    d_hidden, d_normed = OPERATOR.upstream(case, (hidden, normed))
    return Backward(
        d_normed, d_hidden, hidden, mean, rstd, weight, bias, need_x=True, need_weight=True, need_bias=True,
        need_sums=True, cast=None if stream == product else product, need_normed=True, rms=rms,
    )  # fmt: skip


def run(call: Backward, **changes: Any) -> BackwardResults:
    return BackwardResults(*add_layer_norm_backward(*call._replace(**changes)))


@each_dtypes
@each_norm
@each_shape
def test_backward_of_a_block(backend: Backend, shape, rms, dtypes):
    call = backward_of_a_block(backend, shape, rms, dtypes)
    found, plain = run(call), run(call, need_sums=False, cast=None, need_normed=False)
    for name in ("d_x", "d_weight", "d_bias"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    stream, product = dtypes
    assert (found.d_x.dtype, found.normed.dtype, found.d_x_sum.dtype) == (stream, product, torch.float32)
    normed = operator(call.hidden, None, call.weight, call.bias, 1e-5, product, rms)[1]
    assert relative_error(found.normed, normed) < SLACK[product]
    if call.cast is not None:
        assert found.d_x_cast.dtype == product and relative_error(found.d_x_cast, found.d_x) < 2 * SLACK[torch.bfloat16]
    for sums, terms in ((found.d_hidden_sum, call.d_hidden), (found.d_x_sum, found.d_x)):
        exact, size = terms.double().sum(dim=0), terms.double().abs().sum(dim=0)
        assert ((sums.double() - exact).abs() <= 4 * max(SLACK[stream], SLACK[torch.float32]) * size).all()


@each_dtypes
@each_norm
@each_shape
def test_partial_sums_of_a_block(backend: Backend, shape, rms, dtypes):
    """Kernels of Triton leave them to `column_sums`; others complete them."""
    call = backward_of_a_block(backend, shape, rms, dtypes)
    found, completed = run(call), backend.name in ("cpp", "reference")
    for count in (2, 4):
        names = ("d_weight", "d_bias", "d_hidden_sum", "d_x_sum")[:count]
        part = run(call, need_sums=count == 4, partial=True)
        assert torch.equal(part.d_x, found.d_x) and torch.equal(part.normed, found.normed)
        totals = [getattr(part, name) for name in names]
        assert (part.partial_sums.numel() == 0) == completed
        if not completed:
            assert not any(x.numel() for x in totals)
            totals = column_sums([part.partial_sums], torch.float32).split(shape[1])
        for name, total in zip(names, totals, strict=True):  # fp32 sums of numbers up to 4
            torch.testing.assert_close(total, getattr(found, name), rtol=1e-5, atol=4e-7 * shape[0])


@each_dtypes
@each_norm
def test_opcheck_of_backward_of_a_block(backend: Backend, rms, dtypes):
    call = backward_of_a_block(backend, (1, 100), rms, dtypes)
    backend.opcheck(add_layer_norm_backward, tuple(call), compiled=False)


def test_rms_norm_with_a_bias(backend: Backend):
    """The operator has one; `functional.add_rms_norm` has not."""
    x = OPERATOR.case((5, 70), backend.device).inputs["x"].detach()
    weight, bias = torch.linspace(1, 2, 70, device=backend.device), torch.linspace(-1, 1, 70, device=backend.device)
    _, normed, mean, _ = operator(x, None, weight, bias, 1e-6, None, True)
    assert mean.numel() == 0
    torch.testing.assert_close(normed, F.rms_norm(x, (70,), weight, eps=1e-6) + bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_hidden_is_the_rounded_sum_to_the_bit(backend: Backend, dtype):
    """Every number of 16 bits, added to every exponent and sign, NaN, infinity and denormal numbers among them."""
    backend.skip_unless_supported(dtype)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(64, 1024)
    residual = x.flatten()[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].view(64, 1024)
    one = torch.ones(1024)
    hidden, _ = add_layer_norm(*(x.to(backend.device) for x in (x, residual, one, one)))
    assert torch.equal(hidden.cpu().nan_to_num(7.25), (x.float() + residual.float()).to(dtype).nan_to_num(7.25))


def test_large_mean_keeps_the_variance(backend: Backend):
    """E[x²] − E[x]² in fp32 has nothing left of a variance of 1 at a mean of 10,000: normed would be off by its size.
    Here it is off by what fp32 rounds 10,000 by, 5e-4, and no more."""
    case = OPERATOR.case((5, 200), backend.device, mean=1e4)
    found, exact = OPERATOR.kernel(case), OPERATOR.truth(case)
    assert all(relative_error(found[name], exact[name]) < 5e-4 for name in OPERATOR.results)


def test_constant_rows_are_the_bias(backend: Backend):
    for W in (1, 40):
        weight, bias = (torch.randn(W, device=backend.device) for _ in "wb")
        _, normed = add_layer_norm(torch.full((3, W), 2.5, device=backend.device), None, weight, bias)
        assert torch.equal(normed, bias.expand(3, W))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(backend: Backend, value):
    for dtype in backend.dtypes:
        case = OPERATOR.case((5, 70), backend.device, dtype=dtype)
        case.inputs["x"].data[2, 69] = value
        found = OPERATOR.kernel(case)
        assert found["hidden"].isfinite().sum() == 5 * 70 - 1
        for name in ("normed", "d_x"):
            assert found[name].isnan().any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("size", [1e20, 3e38])
@pytest.mark.parametrize("W", [4, 64, 768])
def test_a_variance_that_overflows_is_nan_in_its_row(backend: Backend, size, W):
    """PyTorch's LayerNorm returns NaN or 0 there, by the width."""
    case = OPERATOR.case((3, W), backend.device, residual=False)
    case.inputs["x"].data[1] = size * torch.linspace(-1, 1, W, device=backend.device)
    found = OPERATOR.kernel(case)
    for name in "normed", "d_x":
        assert found[name].isnan().all(dim=1).tolist() == [False, True, False]
        assert found[name][[0, 2]].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_a_variance_that_underflows_is_that_of_pytorch(backend: Backend):
    """With eps=0; a row of zeros is NaN."""
    x = torch.tensor([[3.0, 1, -2, 5], [1e-30, 2e-30, -1e-30, 3e-30], [0, 0, 0, 0]], device=backend.device)
    weight, bias = torch.ones(4, device=backend.device), torch.zeros(4, device=backend.device)
    pairs = [
        (add_layer_norm(x, None, weight, bias, eps=0.0), F.layer_norm(x, (4,), eps=0.0)),
        (add_rms_norm(x, None, weight, eps=0.0), F.rms_norm(x, (4,), eps=0.0)),
    ]
    for (_, normed), expected in pairs:
        assert expected[1].isinf().all()
        torch.testing.assert_close(normed, expected, equal_nan=True)


@pytest.mark.parametrize("norm", [OPERATOR, RMS], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", [(3, 4, 33), (33,)], ids=["three dimensions", "vector"])
def test_rows_of_any_shape(backend: Backend, norm, shape):
    flat = norm.case((math.prod(shape[:-1]), 33), backend.device)
    rows = {name: flat.inputs[name].detach().view(shape) for name in ("x", "residual")}
    found, expected = norm.kernel(flat.with_inputs(**rows)), norm.kernel(flat)
    assert all(torch.equal(x.view(expected[name].shape), expected[name]) for name, x in found.items())


def test_gradient_of_one_result_only(backend: Backend):
    case = OPERATOR.case((5, 40), backend.device)
    inputs = list(case.inputs.values())
    for kept in (0, 1):
        out = add_layer_norm(*inputs)
        upstream = [torch.full_like(x, float(i == kept)) for i, x in enumerate(out)]
        both = torch.autograd.grad(out, inputs, upstream)
        one = torch.autograd.grad(add_layer_norm(*inputs)[kept], inputs, upstream[kept], allow_unused=True)
        assert all(torch.equal(b, torch.zeros_like(b) if a is None else a) for a, b in zip(one, both, strict=True))


def test_gradients_of_x_and_residual_are_two_tensors(backend: Backend):
    """One result of the operator serves both: adding to one must not change the other."""
    case = OPERATOR.case((5, 40), backend.device)
    torch.autograd.backward(add_layer_norm(**case.inputs), [torch.ones(5, 40, device=backend.device)] * 2)
    x, residual = case.inputs["x"], case.inputs["residual"]
    before = residual.grad.clone()
    x.grad += 1
    assert torch.equal(residual.grad, before)
