"""add_layer_norm against fp64 and eager, for every implementation."""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkernels import reference
from skipkernels.functional import add_layer_norm
from skipkernels.ops.add_layer_norm import Gradients, add_layer_norm_backward
from skipkernels.ops.add_layer_norm import add_layer_norm as operator
from skipkernels.testing import SLACK, relative_error
from tests.layouts import LAYOUTS, laid_out
from tests.ops import gpu
from tests.ops.conftest import Backend
from tests.ops.parameters import ids, pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("hidden", "normed", "d_x", "d_residual", "d_weight", "d_bias")


class Case(NamedTuple):
    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    d_hidden: Tensor
    d_normed: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return self._replace(**{name: leaf(x.to(dtype)) for name, x in self._asdict().items() if x is not None})

    def inputs(self) -> list[Tensor]:
        return [x for x in self[:4] if x is not None]


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def make(*shape, dtype=torch.float32, weight_dtype=None, device="cpu", residual=True, mean=3.0, seed=0) -> Case:
    """Rows of different means and sizes."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int, dtype=dtype) -> Tensor:
        return leaf(torch.randn(size, generator=rng, dtype=torch.float64).to(device, dtype))

    x = mean + normal(*shape, dtype=torch.float64) * torch.linspace(0.5, 2, shape[0], device=device).view(
        -1, *[1] * (len(shape) - 1)
    )
    weight, bias = (normal(shape[-1], dtype=weight_dtype or dtype) for _ in "wb")
    return Case(leaf(x.to(dtype)), normal(*shape) if residual else None, weight, bias, normal(*shape), normal(*shape))


def run(function, case: Case) -> list[Tensor]:
    """Results and gradients; those of hidden are left out where it is x."""
    hidden, normed = function(*case[:4])
    outputs, upstream = ([normed], [case.d_normed]) if hidden is case.x else ([hidden, normed], case[4:])
    return [*outputs, *torch.autograd.grad(outputs, case.inputs(), [x.detach() for x in upstream])]


def eager(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    hidden = x if residual is None else x + residual
    wide = hidden.to(weight.dtype)
    return hidden, F.layer_norm(wide, wide.shape[-1:], weight, bias).to(x.dtype)


def check_three_ways(case: Case) -> None:
    exact = run(reference.add_layer_norm, case.to(torch.float64))
    ours, theirs = run(add_layer_norm, case), run(eager, case)
    for number, (value, other, right) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert value.dtype == other.dtype
        error, bound = relative_error(value, right), relative_error(other, right)
        # Where both paths round hidden, its rounding is in everything that follows, but in hidden's own gradient.
        assert error <= bound + SLACK[value.dtype], f"{number}: {error:.2e} against eager's {bound:.2e}"


SHAPES = [
    (1, 3),
    (1, 7),
    (3, 64),
    (2, 3, 5, 33),  # one more than the vectors of a row in C++, for 16-bit types
    (13, 127),
    (33, 512),
    (9, 768),
    (5, 1000),
    (17, 1025),  # one more than a tile of Triton's
    (2, 4096),
    (257, 100),
    (788, 768),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "residual"),
    pairs(SHAPES, DTYPES, [True, False]),
    ids=ids("x", residual=True, plain=False),
)
def test_no_worse_than_eager(backend: Backend, shape, dtype, residual):
    backend.skip_unless_supported(dtype)
    if backend.name == "interpreter" and shape == (788, 768):
        pytest.skip("takes the interpreter seconds")
    check_three_ways(make(*shape, dtype=dtype, device=backend.device, residual=residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_fp32_weights_beside_narrow_features(backend: Backend, dtype):
    backend.skip_unless_supported(dtype)
    case = make(9, 100, dtype=dtype, weight_dtype=torch.float32, device=backend.device)
    check_three_ways(case)
    assert run(add_layer_norm, case)[-1].dtype == torch.float32


def mixed(shape, stream, product, device) -> tuple[Case, torch.dtype]:
    """A residual stream of one dtype, a residual and a result of another, fp32 weights."""
    case = make(*shape, dtype=stream, weight_dtype=torch.float32, device=device)
    residual, d_normed = (leaf(x.to(product)) for x in (case.residual, case.d_normed))
    return case._replace(residual=residual, d_normed=d_normed), product


def dtype_ids(dtypes: tuple[torch.dtype, ...]) -> str:
    return "-".join(str(dtype)[6:] for dtype in dtypes)


MIXED = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.bfloat16),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("dtypes", MIXED, ids=dtype_ids)
@pytest.mark.parametrize("shape", [(1, 7), (13, 127), (2, 5, 768), (70, 33)], ids=str)
def test_several_dtypes(backend: Backend, shape, dtypes):
    """The residual stream, and the dtype of the products beside it: results are rounded once."""
    for dtype in dtypes:
        backend.skip_unless_supported(dtype)
    case, product = mixed(shape, *dtypes, backend.device)
    exact = run(reference.add_layer_norm, case.to(torch.float64))
    function = add_layer_norm if dtypes[0] == torch.float32 else raw
    ours, theirs = (run(partial(f, out_dtype=product), case) for f in (function, reference.add_layer_norm))
    expected = [dtypes[0], product, dtypes[0], product, torch.float32, torch.float32]
    assert [x.dtype for x in ours] == [x.dtype for x in theirs] == expected
    for name, value, other, right in zip(NAMES, ours, theirs, exact, strict=True):
        error, bound = relative_error(value, right), relative_error(other, right)
        assert error <= bound + SLACK[value.dtype], f"{name}: {error:.2e} against the reference's {bound:.2e}"


def raw(x, residual, weight, bias, out_dtype) -> tuple[Tensor, Tensor]:
    """The operator, which accepts more pairs of dtypes than the public function."""
    return operator(x, residual, weight, bias, 1e-5, out_dtype)[:2]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, *MIXED], ids=lambda dtypes: "-".join(str(d)[6:] for d in dtypes)
)
@pytest.mark.parametrize("rows", [1, 70, 257])
def test_backward_of_a_block(backend: Backend, rows, dtypes):
    """Everything that backward emits for a fused block: d_x twice, normed, and the sums of both gradients."""
    stream, product = dtypes
    for dtype in dtypes:
        backend.skip_unless_supported(dtype)
    case, _ = mixed((rows, 100), stream, product, backend.device)
    with torch.no_grad():
        hidden, normed, mean, rstd = operator(*case[:4], 1e-5, product)
        cast = None if stream == product else product
        saved = case.d_normed, case.d_hidden, hidden, mean, rstd, case.weight
        found = Gradients(*add_layer_norm_backward(*saved, case.bias, True, True, True, True, False, cast))
        plain = Gradients(*add_layer_norm_backward(*saved, None, True, True, True, False, False, None))
    for name in ("d_x", "d_weight", "d_bias"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    assert (found.d_x.dtype, found.normed.dtype, found.d_x_sum.dtype) == (stream, product, torch.float32)
    assert relative_error(found.normed, normed) < SLACK[product]
    if cast is not None:
        assert found.d_x_cast.dtype == product and relative_error(found.d_x_cast, found.d_x) < 2 * SLACK[torch.bfloat16]
    for sums, terms in ((found.d_hidden_sum, case.d_hidden), (found.d_x_sum, found.d_x)):
        exact, size = terms.double().sum(dim=0), terms.double().abs().sum(dim=0)
        assert ((sums.double() - exact).abs() <= 4 * max(SLACK[stream], SLACK[torch.float32]) * size).all()


def test_without_weight_is_the_unit_row(backend: Backend):
    case = make(5, 70, device=backend.device)
    ones, zeros = torch.ones_like(case.weight), torch.zeros_like(case.bias)
    unit = operator(case.x, None, None, None, 1e-5, None)[1]
    torch.testing.assert_close(unit, operator(case.x, None, ones, zeros, 1e-5, None)[1])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(st.data())
def test_every_shape(backend: Backend, data):
    shape = data.draw(st.lists(st.integers(1, 5), max_size=2)) + [data.draw(st.integers(1, 40))]
    W = data.draw(st.sampled_from([3, 7, 31, 32, 65, 130]))
    dtype, weight_dtype = (data.draw(st.sampled_from(backend.dtypes)) for _ in "xw")
    if weight_dtype == torch.float64:
        weight_dtype = dtype
    case = make(
        *shape,
        W,
        dtype=dtype,
        weight_dtype=weight_dtype,
        device=backend.device,
        residual=data.draw(st.booleans()),
        mean=data.draw(st.sampled_from([0.0, 30.0])),
    )
    exact, ours = run(reference.add_layer_norm, case.to(torch.float64)), run(add_layer_norm, case)
    rounding = SLACK[dtype] * (1 + 30 * case.x.detach().abs().max().item())  # of hidden, with a deviation of about 1
    for value, right in zip(ours, exact, strict=True):
        assert (value.double() - right).abs().max() <= (SLACK[value.dtype] + rounding) * (1 + right.abs().max()) * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
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
    case = make(5, 200, device=backend.device, mean=1e4)
    exact = reference.add_layer_norm(*case.to(torch.float64)[:4])
    for value, right in zip(add_layer_norm(*case[:4]), exact, strict=True):
        assert relative_error(value, right) < 5e-4


def test_constant_rows_are_the_bias(backend: Backend):
    for W in (1, 40):
        case = make(3, W, device=backend.device)
        _, normed = add_layer_norm(torch.full_like(case.x, 2.5), None, case.weight, case.bias)
        assert torch.equal(normed, case.bias.detach().expand(3, W))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(backend: Backend, value):
    for dtype in backend.dtypes:
        case = make(5, 70, dtype=dtype, device=backend.device)
        case.x.data[2, 69] = value
        hidden, normed, d_x, *_ = run(add_layer_norm, case)
        assert hidden.isfinite().sum() == 5 * 70 - 1
        for result in (normed, d_x):
            assert result.isnan().any(dim=1).tolist() == [False, False, True, False, False]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
@pytest.mark.parametrize("W", [4, 64, 768])
def test_a_variance_that_overflows_is_nan_in_its_row(backend: Backend, size, W):
    """PyTorch's LayerNorm returns NaN or 0 there, by the width."""
    case = make(3, W, device=backend.device, residual=False)
    case.x.data[1] = size * torch.linspace(-1, 1, W, device=backend.device)
    normed, d_x, *_ = run(add_layer_norm, case)
    for result in normed, d_x:
        assert result.isnan().all(dim=1).tolist() == [False, True, False]
        assert result[[0, 2]].isfinite().all()


def test_a_large_variance_that_fits_is_normed(backend: Backend):
    case = make(3, 64, device=backend.device, residual=False)
    case.x.data.mul_(1e17)
    check_three_ways(case)


def test_no_rows(backend: Backend):
    case = make(3, 40, device=backend.device)
    case = case._replace(**{name: leaf(getattr(case, name)[:0]) for name in ("x", "residual", "d_hidden", "d_normed")})
    hidden, normed, d_x, _, d_weight, d_bias = run(add_layer_norm, case)
    assert hidden.shape == normed.shape == d_x.shape == (0, 40)
    assert not d_weight.any() and not d_bias.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: Backend, layout):
    strided = Case(*(leaf(laid_out(x.detach(), layout)) for x in make(6, 70, device=backend.device)))
    plain = Case(*(leaf(x.detach().clone(memory_format=torch.contiguous_format)) for x in strided))
    for ours, theirs in zip(run(add_layer_norm, strided), run(add_layer_norm, plain), strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(788, 768), (3000, 100), (131, 4096)])
def test_bits_do_not_depend_on_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(add_layer_norm, make(*shape, dtype=dtype)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("residual", [True, False])
def test_gradcheck(backend: Backend, residual):
    backend.skip_unless_supported(torch.float64)
    case = make(3, 7, dtype=torch.float64, residual=residual)
    assert torch.autograd.gradcheck(lambda *x: add_layer_norm(x[0], x[1] if residual else None, *x[-2:]), case.inputs())


def test_opcheck(backend: Backend):
    for residual in (True, False):
        case = make(2, 3, 33, device=backend.device, residual=residual)
        backend.opcheck(operator, (*case[:4], 1e-5, None))
        with torch.no_grad():
            hidden, _, mean, rstd = operator(*case[:4], 1e-5, None)
        saved = (hidden if residual else case.x.detach(), mean, rstd, case.weight.detach())
        for needs in itertools.product([True, False], repeat=3):
            d_hidden = case.d_hidden.detach() if residual else None
            rest = (None, *needs, False, False, None)
            backend.opcheck(add_layer_norm_backward, (case.d_normed.detach(), d_hidden, *saved, *rest))
        backend.opcheck(operator, (case.x, None, None, None, 1e-5, torch.float16))
    rest = (case.bias.detach(), True, True, True, True, False, torch.float16)
    backend.opcheck(add_layer_norm_backward, (case.d_normed.detach(), case.d_hidden.detach(), *saved, *rest))


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 3) for w in itertools.combinations(range(4), n)])
def test_only_needed_gradients_are_computed(backend: Backend, wanted, monkeypatch):
    case = make(5, 40, device=backend.device)
    everything = run(add_layer_norm, case)[2:]
    inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(case.inputs())]
    calls = []
    monkeypatch.setattr(
        "skipkernels.ops.add_layer_norm.add_layer_norm_backward",
        lambda *args: calls.append(add_layer_norm_backward(*args)) or calls[-1],
    )
    outputs = add_layer_norm(*inputs)
    differentiable = [(out, up.detach()) for out, up in zip(outputs, case[4:], strict=True) if out.requires_grad]
    torch.autograd.backward(*zip(*differentiable, strict=True))
    for i, x in enumerate(inputs):
        assert (x.grad is not None) == (i in wanted)
        if i in wanted:
            assert torch.equal(x.grad, everything[i])
    d_x, d_weight, d_bias, *rest = calls[0]
    assert not any(x.numel() for x in rest)
    assert [d_x.numel() > 0, d_weight.numel() > 0, d_bias.numel() > 0] == [
        0 in wanted or 1 in wanted,
        2 in wanted,
        3 in wanted,
    ]


def test_gradient_of_one_result_only(backend: Backend):
    case = make(5, 40, device=backend.device)
    for kept in (0, 1):
        upstream = [up.detach() * (i == kept) for i, up in enumerate(case[4:])]
        both = torch.autograd.grad(add_layer_norm(*case[:4]), case.inputs(), upstream)
        one = torch.autograd.grad(
            add_layer_norm(*case[:4])[kept], case.inputs(), upstream[kept], allow_unused=True, retain_graph=True
        )
        for a, b in zip(one, both, strict=True):
            assert torch.equal(b, torch.zeros_like(b)) if a is None else torch.equal(a, b)


def test_gradients_of_x_and_residual_are_two_tensors(backend: Backend):
    """One result of the operator serves both: adding to one must not change the other."""
    case = make(5, 40, device=backend.device)
    torch.autograd.backward(add_layer_norm(*case[:4]), [x.detach() for x in case[4:]])
    before = case.residual.grad.clone()
    case.x.grad += 1
    assert torch.equal(case.residual.grad, before)


@pytest.mark.parametrize("residual", [True, False])
def test_saves_hidden_weight_and_two_numbers_per_row(backend: Backend, residual):
    case = make(6, 40, device=backend.device, residual=residual)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        hidden, _ = add_layer_norm(*case[:4])
    given = {hidden.data_ptr(), case.weight.data_ptr()}
    assert given <= {x.data_ptr() for x in saved}
    assert [x.numel() for x in saved if x.data_ptr() not in given] == [6, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("residual", [True, False])
def test_autocast_casts_features_and_not_the_weights(backend: Backend, dtype, residual):
    backend.skip_unless_supported(dtype)
    case = make(5, 40, device=backend.device, residual=residual)
    mixed = case._replace(residual=leaf(case.residual.to(dtype)) if residual else None)  # as a linear layer gives it
    with torch.autocast(backend.device.type, dtype=dtype):
        hidden, normed = add_layer_norm(*mixed[:4])
    assert normed.dtype == dtype and hidden.dtype == (dtype if residual else torch.float32)
    rounded = case._replace(x=case.x.detach().to(dtype), residual=mixed.residual)
    assert torch.equal(normed, add_layer_norm(*rounded[:4])[1])
    normed.sum().backward()
    assert case.x.grad.dtype == case.weight.grad.dtype == torch.float32


def test_every_element_is_written(backend: Backend, poisoned_memory):
    for residual in (True, False):
        for shape in ((5, 33), (70, 64)):
            assert all(
                x.isfinite().all() for x in run(add_layer_norm, make(*shape, device=backend.device, residual=residual))
            )


def test_compiles_into_one_graph(backend: Backend):
    def step(x, residual, weight, bias):
        hidden, normed = add_layer_norm(x * 2, residual, weight, bias)
        return hidden + normed

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 40), (4, 5, 40)):
        case = make(*shape, device=backend.device)
        ours, theirs = compiled(*case[:4]), step(*case[:4])
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(x, case.inputs(), case.d_normed.detach()) for x in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.gpu
def test_graph_replays():
    gpu.check_replays(
        lambda *case: run(add_layer_norm, Case(*case)), *(make(788, 768, device="cuda", seed=s) for s in (0, 1))
    )


@pytest.mark.gpu
def test_inductor_compiles_with_any_shape():
    compiled = torch.compile(add_layer_norm, fullgraph=True, dynamic=True)
    for shape in ((4, 197, 768), (3, 50, 768)):
        case = make(*shape, device="cuda", dtype=torch.bfloat16)
        for ours, theirs in zip(run(compiled, case), run(add_layer_norm, case), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_runs_on_the_device_of_its_tensors():
    check_three_ways(make(9, 768, device=gpu.second_device()))
