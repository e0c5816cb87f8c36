"""mlp_activation against fp64 and eager, for every implementation."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkernels import reference
from skipkernels.functional import mlp_activation
from skipkernels.ops.mlp_activation import KINDS, mlp_activation_backward
from skipkernels.ops.mlp_activation import mlp_activation as operator
from skipkernels.testing import SLACK, relative_error
from tests.layouts import LAYOUTS, laid_out
from tests.ops import gpu
from tests.ops.conftest import Backend
from tests.ops.parameters import ids, pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Case(NamedTuple):
    x: Tensor
    bias: Tensor | None
    d_out: Tensor
    kind: str = "quick_gelu"

    def to(self, dtype: torch.dtype) -> Case:
        x, bias, d_out = (None if x is None else leaf(x.to(dtype)) for x in self[:3])
        return self._replace(x=x, bias=bias, d_out=d_out)

    def inputs(self) -> list[Tensor]:
        return [self.x] if self.bias is None else [self.x, self.bias]


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def make(*shape, kind="quick_gelu", dtype=torch.float32, bias_dtype=None, device="cpu", bias=True, seed=0) -> Case:
    rng = torch.Generator().manual_seed(seed)
    x, d_out = (torch.randn(shape, generator=rng) * size for size in (2, 1))
    vector = torch.randn(shape[-1:], generator=rng)
    return Case(
        leaf(x.to(device, dtype)),
        leaf(vector.to(device, bias_dtype or dtype)) if bias else None,
        d_out.to(device, dtype),
        kind,
    )


def run(function, case: Case) -> list[Tensor]:
    out = function(case.x, case.bias, case.kind)
    return [out, *torch.autograd.grad(out, case.inputs(), case.d_out.detach())]


def eager(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    u = x if bias is None else (x + bias).to(x.dtype)
    if kind == "quick_gelu":
        return u * torch.sigmoid(1.702 * u)
    return F.gelu(u, approximate="tanh" if kind == "gelu_tanh" else "none")


def check_three_ways(case: Case) -> None:
    exact = run(reference.mlp_activation, case.to(torch.float64))
    ours, theirs = run(mlp_activation, case), run(eager, case)
    for name, value, other, right in zip(("out", "d_x", "d_bias"), ours, theirs, exact, strict=False):
        assert value.dtype == other.dtype
        error, bound = relative_error(value, right), relative_error(other, right)
        assert error <= bound + SLACK[value.dtype], f"{name}: {error:.2e} against eager's {bound:.2e}"


SHAPES = [
    (1, 1),
    (1, 7),
    (2, 3, 5, 33),  # one more than the vectors of a row in C++, for 16-bit types
    (33, 512),
    (9, 513),  # one more than a chunk of C++'s, two than blocks of columns of Triton's
    (129, 130),
    (7, 3072),
    (788, 768),
]


@pytest.mark.parametrize(("shape", "dtype", "kind"), pairs(SHAPES, DTYPES, KINDS), ids=ids("x"))
def test_no_worse_than_eager(backend: Backend, kind, shape, dtype):
    backend.skip_unless_supported(dtype)
    if backend.name == "interpreter" and shape == (788, 768):
        pytest.skip("takes the interpreter seconds")
    check_three_ways(make(*shape, kind=kind, dtype=dtype, device=backend.device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_fp32_bias_beside_narrow_features(backend: Backend, dtype):
    backend.skip_unless_supported(dtype)
    case = make(9, 100, dtype=dtype, bias_dtype=torch.float32, device=backend.device)
    check_three_ways(case)
    assert run(mlp_activation, case)[-1].dtype == torch.float32


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(st.data())
def test_every_shape(backend: Backend, data):
    shape = data.draw(st.lists(st.integers(1, 5), max_size=2)) + [data.draw(st.integers(1, 40))]
    case = make(
        *shape,
        data.draw(st.sampled_from([1, 2, 31, 32, 65, 130])),
        kind=data.draw(st.sampled_from(KINDS)),
        dtype=data.draw(st.sampled_from(backend.dtypes)),
        device=backend.device,
        bias=data.draw(st.booleans()),
    )
    exact, ours = run(reference.mlp_activation, case.to(torch.float64)), run(mlp_activation, case)
    for value, right in zip(ours, exact, strict=True):
        assert (value.double() - right).abs().max() <= 4 * SLACK[value.dtype] * (1 + right.abs().max())


def everywhere(dtype: torch.dtype) -> Tensor:
    """Numbers of every magnitude and sign, including denormal numbers and 0; dense from −15 to 15."""
    tiny, largest = torch.finfo(dtype).smallest_normal / 8, torch.finfo(dtype).max
    sizes = torch.logspace(torch.tensor(tiny).log2().item(), torch.tensor(largest).log2().item() - 1e-3, 500, 2.0)
    dense = torch.linspace(-15, 15, 20001)
    return torch.cat([-sizes, torch.tensor([0.0, -largest, largest]), sizes, dense]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_error(backend: Backend, kind, dtype):
    """Compare the error of each result, in steps of its dtype, from −max to max, instead of the norm of all errors."""
    backend.skip_unless_supported(dtype)
    if backend.name == "reference":
        pytest.skip("the reference calls PyTorch's own functions")
    x = everywhere(dtype)
    case = Case(leaf(x.to(backend.device)), None, torch.ones_like(x).to(backend.device), kind)
    out, d_x = (result.cpu().double() for result in run(mlp_activation, case))
    wide = leaf(x.double())
    right, d_right = (y.detach() for y in run(reference.mlp_activation, Case(wide, None, torch.ones_like(wide), kind)))
    half_step, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    least = max(least, 2e-38)  # a step of denormal numbers; and what is smaller than this may be 0
    # In fp32 a handful of roundings; in 16 bits that of the result, and a tenth of fp16's for the rest.
    rounding = 6 * half_step if dtype == torch.float32 else 1.15 * half_step
    # What erf is off by counts u times; the slope is a sum of terms of size 1 that may cancel.
    terms = x.double().abs().clamp(max=15) * 2**-22
    assert ((out - right).abs() <= rounding * right.abs() + terms + least).all()
    cancelled = 2**-22 if dtype == torch.float32 else 3e-5
    assert ((d_x - d_right).abs() <= rounding * d_right.abs() + 4 * terms + cancelled).all()


@pytest.mark.parametrize("kind", KINDS)
def test_relative_precision_where_the_result_vanishes(kind):
    """C++ is accurate down to 1e-37, to 2⁻²² per unit of the argument of exp; 1 + erf(u/√2) cancels to 0."""
    u = torch.linspace(-12.7, -1, 1001)
    wide = u.double()
    gate = {
        "quick_gelu": torch.sigmoid(1.702 * wide),
        "gelu": torch.special.erfc(wide * -(0.5**0.5)) / 2,
        "gelu_tanh": torch.sigmoid((8 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)),
    }
    right = wide * gate[kind]
    seen = right.abs() > 1e-37
    error = ((mlp_activation(u, kind=kind).double() - right) / right)[seen].abs().max().item()
    assert error < 87 * 2**-22, error


@pytest.mark.parametrize("kind", KINDS)
def test_infinity_and_nan_follow_the_formula(backend: Backend, kind):
    if backend.name == "reference":
        pytest.skip("the reference calls PyTorch's own functions, and vectorised gelu makes NaN of infinity")
    for dtype in backend.dtypes:
        x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=dtype, device=backend.device)
        out, d_x = run(mlp_activation, Case(leaf(x), None, torch.ones_like(x), kind))
        assert out[0] == torch.inf and out[1:3].isnan().all() and out[3].isfinite()
        assert d_x[:3].isnan().all() and d_x[3].isfinite()


def test_no_rows(backend: Backend):
    case = make(0, 40, device=backend.device)
    out, d_x, d_bias = run(mlp_activation, case)
    assert out.shape == d_x.shape == (0, 40) and not d_bias.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: Backend, layout):
    strided = Case(*(leaf(laid_out(x.detach(), layout)) for x in make(6, 70, device=backend.device)[:3]))
    plain = Case(*(leaf(x.detach().clone(memory_format=torch.contiguous_format)) for x in strided[:3]))
    for ours, theirs in zip(run(mlp_activation, strided), run(mlp_activation, plain), strict=True):
        assert torch.equal(ours, theirs) and ours.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(788, 768), (3000, 100), (31, 4096)])
def test_bits_do_not_depend_on_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(mlp_activation, make(*shape, dtype=dtype)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(backend: Backend, kind, bias):
    backend.skip_unless_supported(torch.float64)
    case = make(3, 7, kind=kind, dtype=torch.float64, bias=bias)
    assert torch.autograd.gradcheck(lambda x, bias=None: mlp_activation(x, bias, kind), case.inputs())


def test_opcheck(backend: Backend):
    case = make(2, 3, 33, device=backend.device)
    for bias in (case.bias, None):
        backend.opcheck(operator, (case.x, bias, KINDS.index("gelu")))
        saved = (case.d_out, case.x.detach(), None if bias is None else bias.detach(), KINDS.index("gelu"))
        for needs in itertools.product([True, False], [True, False] if bias is not None else [False], [True, False]):
            backend.opcheck(mlp_activation_backward, (*saved, *needs, False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_backward_recomputes_the_result(backend: Backend, dtype, kind):
    backend.skip_unless_supported(dtype)
    case = make(70, 513, kind=kind, dtype=dtype, device=backend.device)
    out, d_x, d_bias = (x.detach() for x in run(mlp_activation, case))
    with torch.no_grad():
        found = mlp_activation_backward(case.d_out, case.x, case.bias, KINDS.index(kind), True, True, True, False)
    assert torch.equal(found[0], d_x) and torch.equal(found[1], d_bias)
    torch.testing.assert_close(found[2], out, rtol=SLACK[dtype], atol=SLACK[dtype])


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_only_needed_gradients_are_computed(backend: Backend, wanted, monkeypatch):
    case = make(5, 40, device=backend.device)
    everything = run(mlp_activation, case)[1:]
    inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(case.inputs())]
    calls = []
    monkeypatch.setattr(
        "skipkernels.ops.mlp_activation.mlp_activation_backward",
        lambda *args: calls.append(mlp_activation_backward(*args)) or calls[-1],
    )
    mlp_activation(*inputs, case.kind).backward(case.d_out)
    for i, x in enumerate(inputs):
        assert (x.grad is not None) == (i in wanted) == (calls[0][i].numel() > 0)
        if i in wanted:
            assert torch.equal(x.grad, everything[i])


def test_saves_the_inputs_and_nothing_else(backend: Backend):
    case = make(6, 40, device=backend.device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mlp_activation(*case[:2])
    assert {x.data_ptr() for x in saved} == {case.x.data_ptr(), case.bias.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_autocast_casts_features_and_not_the_bias(backend: Backend, dtype):
    backend.skip_unless_supported(dtype)
    case = make(5, 40, device=backend.device)
    with torch.autocast(backend.device.type, dtype=dtype):
        out = mlp_activation(*case[:2])
    assert out.dtype == dtype
    assert torch.equal(out, mlp_activation(case.x.detach().to(dtype), case.bias))
    out.sum().backward()
    assert case.x.grad.dtype == case.bias.grad.dtype == torch.float32


def test_every_element_is_written(backend: Backend, poisoned_memory):
    for shape in ((5, 33), (70, 64), (3, 513)):
        assert all(x.isfinite().all() for x in run(mlp_activation, make(*shape, device=backend.device)))


def test_compiles_into_one_graph(backend: Backend):
    def step(x, bias):
        return mlp_activation(x * 2, bias, "gelu_tanh") * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 40), (4, 5, 40)):
        case = make(*shape, device=backend.device)
        ours, theirs = compiled(*case[:2]), step(*case[:2])
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(x, case.inputs(), case.d_out) for x in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_graph_replays(kind):
    cases = [make(788, 3072, device="cuda", seed=seed)[:3] for seed in (0, 1)]
    gpu.check_replays(lambda *case: run(mlp_activation, Case(*case, kind)), *cases)


@pytest.mark.gpu
def test_inductor_compiles_with_any_shape():
    compiled = torch.compile(mlp_activation, fullgraph=True, dynamic=True)
    for shape in ((4, 197, 3072), (3, 50, 3072)):
        case = make(*shape, device="cuda", dtype=torch.bfloat16)
        for ours, theirs in zip(run(compiled, case), run(mlp_activation, case), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_runs_on_the_device_of_its_tensors():
    check_three_ways(make(9, 768, device=gpu.second_device()))
