"""pooled_attention against fp64 and eager, through the public function and the operator."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipkernels import reference
from skipkernels.functional import pooled_attention
from skipkernels.ops.pooled_attention import pooled_attention as operator
from skipkernels.ops.pooled_attention import pooled_attention_backward as backward_operator
from skipkernels.testing import SLACK, relative_error
from tests.ops import gpu
from tests.ops.parameters import ids, pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("query", "key", "value")


class Case(NamedTuple):
    inputs: tuple[Tensor, ...]  # by NAMES
    options: dict

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """Fresh leaves."""
        inputs = tuple(x.detach().to(device, dtype).requires_grad_() for x in self.inputs)
        return Case(inputs, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()})


def make(B, N, H, E, dtype=torch.float32, device="cpu", *, lengths=None, seed=0, **options) -> Case:
    """Inputs rounded to the dtype, so that all are equal; random `lengths` if "drawn"."""
    rng = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randn(shape, generator=rng) for shape in ((B, H, E), (B, N, H, E), (B, N, H, E)))
    if lengths is not None:
        options["lengths"] = torch.randint(1, N + 1, (B,), generator=rng)
    return Case(inputs, options).to(dtype, device)


def kernel(case: Case) -> Tensor:
    return pooled_attention(*case.inputs, **case.options)


def truth(case: Case) -> Tensor:
    return reference.pooled_attention(*case.inputs, **case.options)


def eager(case: Case) -> Tensor:
    query, key, value = case.inputs
    mask = None
    if "lengths" in case.options:
        mask = (torch.arange(key.shape[1], device=key.device) < case.options["lengths"][:, None])[:, None, None]
    q, k, v = query[:, :, None], key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.options.get("scale"))[:, :, 0]


def result_and_gradients(function, case: Case) -> list[Tensor]:
    out = function(case)
    d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).sin().to(out)
    return [out, *torch.autograd.grad(out, case.inputs, d_out)]


def check_three_ways(case: Case) -> None:
    dtype = case.inputs[0].dtype
    exact = result_and_gradients(truth, case.to(torch.float64))
    ours, theirs = result_and_gradients(kernel, case), result_and_gradients(eager, case)
    for name, value, other, right in zip(("out", *NAMES), ours, theirs, exact, strict=True):
        assert value.dtype == dtype
        error, bound = (relative_error(x.cpu(), right) for x in (value, other))
        assert error <= bound + SLACK[dtype], f"{name}: {error:.2e} against eager's {bound:.2e}"


SHAPES = [
    (1, 2, 1, 2),
    (3, 7, 2, 7),
    (4, 197, 3, 64),
    (26, 11, 2, 64),
    (2, 33, 3, 80),  # one more than a block of keys
    (1, 577, 2, 96),
    (5, 77, 1, 128),
    (2, 13, 1, 130),  # one more than a block of head width
]


@pytest.mark.parametrize(
    ("shape", "dtype", "lengths"),
    pairs(SHAPES, DTYPES, [None, "drawn"]),
    ids=ids("B{}-N{}-H{}-E{}", whole=None, lengths="drawn"),
)
def test_no_worse_than_eager(backend, shape, dtype, lengths):
    backend.skip_unless_supported(dtype)
    check_three_ways(make(*shape, dtype, backend.device, lengths=lengths))


def test_one_key_returns_its_value(backend):
    case = make(3, 1, 2, 16, device=backend.device)
    out, d_query, d_key, d_value = result_and_gradients(kernel, case)
    assert torch.equal(out, case.inputs[2][:, 0])
    assert d_value.abs().sum() > 0
    for gradient in d_query, d_key:  # the weight is 1 whatever the score is
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.5])
def test_any_scale(backend, scale):
    check_three_ways(make(2, 35, 2, 16, device=backend.device, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("deviation", [10, 30, 100, 300])
def test_no_worse_than_eager_at_any_deviation_of_scores(backend, deviation, dtype):
    """Queries and keys are multiples of 1/8, so that scores are exact; errors are those of softmax and its gradient."""
    backend.skip_unless_supported(dtype)
    case = make(24, 12, 2, 16, device=backend.device)
    for i, factor in (0, deviation), (1, 1):
        case.inputs[i].data.mul_(8 * factor).round_().div_(8)
    check_three_ways(case.to(dtype, backend.device))


def test_large_products_neither_overflow_nor_underflow(backend):
    case = make(3, 40, 2, 16, device=backend.device)
    case.inputs[0].data.mul_(1000)
    exact = result_and_gradients(truth, case.to(torch.float64))
    for value, right in zip(result_and_gradients(kernel, case), exact, strict=True):
        # Products of 10⁴ have errors of 10⁻³; gradients vanish if one key has all the weight.
        assert (value.cpu() - right).abs().max() < 1e-3 * max(1.0, right.abs().max().item())


def test_keys_past_the_length_are_ignored(backend):
    case = make(4, 70, 2, 16, device=backend.device, lengths="drawn")
    clean = result_and_gradients(kernel, case)
    past = torch.arange(70, device=backend.device) >= case.options["lengths"][:, None]
    for x in case.inputs[1:]:
        x.data[past] = torch.nan
    spoilt = result_and_gradients(kernel, case)
    assert all(torch.equal(a, b) for a, b in zip(clean, spoilt, strict=True))
    assert (spoilt[2][past] == 0).all() and (spoilt[3][past] == 0).all()


@st.composite
def cases(draw) -> Case:
    B, N, H = draw(st.integers(1, 6)), draw(st.integers(2, 70)), draw(st.integers(1, 5))
    E, dtype = draw(st.sampled_from([2, 7, 16, 31, 64])), draw(st.sampled_from(DTYPES))
    lengths = draw(st.sampled_from([None, "drawn"]))
    case = make(B, N, H, E, dtype, lengths=lengths, seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):  # as parts of one projection
        key, value = torch.stack([x.detach() for x in case.inputs[1:]], dim=2).unbind(2)
        case = case._replace(inputs=(case.inputs[0], key.requires_grad_(), value.requires_grad_()))
    return case


@given(cases())
def test_every_shape_and_layout(case):
    check_three_ways(case)


LAYOUTS = ["packed projection", "heads first", "transposed", "every other", "unaligned", "expanded"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    case = make(3, 35, 2, 32, device=backend.device)

    def lay_out(x: Tensor) -> Tensor:
        if layout == "packed projection":
            return torch.stack([x * torch.nan, x], dim=-3).unbind(-3)[1]
        if layout == "heads first":
            return x.transpose(0, -2).contiguous().transpose(0, -2)
        if layout == "transposed":
            return x.mT.contiguous().mT
        if layout == "every other":
            return torch.stack([x, x * torch.nan], dim=-1).flatten(-2)[..., ::2]
        if layout == "unaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        return x[:1].expand(x.shape)

    inputs = [lay_out(x.detach()) for x in case.inputs]
    strided = case._replace(inputs=tuple(x.detach().requires_grad_() for x in inputs))
    plain = case._replace(inputs=tuple(x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs))
    tolerance = 1e-5 if backend.name == "reference" else 0  # BLAS sums in another order
    for ours, theirs in zip(result_and_gradients(kernel, strided), result_and_gradients(kernel, plain), strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_saves_the_inputs_the_result_and_lse_without_a_copy():
    query, projection = torch.randn(4, 3, 16, requires_grad=True), torch.randn(4, 50, 2, 3, 16, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        pooled_attention(query, *projection.unbind(2))
    own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    assert sum(own.values()) == 4 * (query.numel() + projection.numel() + 4 * 3 * 16) + 8 * 4 * 3


@pytest.mark.parametrize("shape", [(4, 197, 12, 64), (26, 11, 8, 64), (1, 3000, 5, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(result_and_gradients(kernel, make(*shape, dtype, lengths="drawn")))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)
@pytest.mark.parametrize("lengths", [None, "drawn"], ids=["whole", "lengths"])
def test_gradcheck(backend, lengths):
    case = make(2, 4, 2, 3, torch.float64, lengths=lengths)
    assert torch.autograd.gradcheck(lambda *inputs: kernel(case._replace(inputs=inputs)), case.inputs)


@pytest.mark.parametrize("lengths", [None, "drawn"], ids=["whole", "lengths"])
def test_opcheck(lengths):
    case = make(3, 5, 2, 4, lengths=lengths)
    rest = case.options.get("lengths"), 0.5
    torch.library.opcheck(operator, (*case.inputs, *rest))
    inputs = [x.detach() for x in case.inputs]
    out, lse = operator(*inputs, *rest)
    for needs in [(True,) * 3, (False,) * 3, (True, False, False), (False, True, False), (False, False, True)]:
        torch.library.opcheck(backward_operator, (torch.ones_like(out), *inputs, out, lse, *rest, *needs))


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 1}, {1, 2}], ids=str)
def test_only_needed_gradients_are_computed(backend, wanted, monkeypatch):
    case = make(3, 40, 2, 16, device=backend.device, lengths="drawn")
    everything = result_and_gradients(kernel, case)[1:]
    case = case._replace(inputs=tuple(x.detach().requires_grad_(i in wanted) for i, x in enumerate(case.inputs)))
    calls = []
    monkeypatch.setattr(
        "skipkernels.ops.pooled_attention.pooled_attention_backward",
        lambda *args: calls.append(backward_operator(*args)) or calls[-1],
    )
    out = kernel(case)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).sin().to(out))
    for i, x in enumerate(case.inputs):
        assert (x.grad is not None) == (i in wanted)
        assert (calls[0][i].numel() > 0) == (i in wanted)
        if i in wanted:
            assert torch.equal(x.grad, everything[i])


def test_every_element_is_written(backend, poisoned_memory):
    """Unwritten results would be NaN."""
    case = make(3, 40, 2, 16, device=backend.device, lengths="drawn")
    assert all(x.isfinite().all() for x in result_and_gradients(kernel, case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_all_inputs(dtype):
    case = make(3, 9, 2, 16)
    mixed = case._replace(inputs=(case.inputs[0].detach().to(dtype).requires_grad_(), *case.inputs[1:]))
    with torch.autocast("cpu", dtype=dtype):
        out = kernel(mixed)
    assert torch.equal(out, kernel(case.to(dtype)))
    assert torch.autograd.grad(out.sum(), mixed.inputs[1])[0].dtype == torch.float32
    in_fp64 = case.to(torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(kernel(in_fp64), kernel(in_fp64.to(torch.float64)))


def test_compiles_into_one_graph():
    def step(query, key, value, lengths):
        return pooled_attention(query * 2, key, value) + pooled_attention(query, key, value, lengths=lengths)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((6, 5, 4, 16), (9, 3, 2, 16)):
        case = make(*shape, lengths="drawn")
        ours, theirs = (function(*case.inputs, case.options["lengths"]) for function in (compiled, step))
        assert torch.equal(ours, theirs)
        gradients = (torch.autograd.grad(x.sum(), case.inputs) for x in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


QUERY, KEY = torch.randn(3, 2, 4), torch.randn(3, 5, 2, 4)
BAD = [
    ({"query": KEY}, ValueError, r"query must be \[B, H, E\] with B, H, E ≥ 1; got \[3, 5, 2, 4\]"),
    ({"query": QUERY.int()}, TypeError, r"query must be float32, .* got torch.int32"),
    ({"key": KEY[:, :0]}, ValueError, r"key must be \[B=3, N, H=2, E=4\] with N ≥ 1 to match query .*; got \[3, 0"),
    ({"key": KEY.half()}, TypeError, r"key must be float32; got torch.float16. Convert one"),
    ({"value": KEY[:, :4]}, ValueError, r"value must be \[B=3, N=5, H=2, E=4\] to match query .*; got \[3, 4"),
    ({"value": KEY.to("meta")}, ValueError, r"value must be on cpu, where query is; got meta"),
    ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths must be \[B=3\] to match query \[3, 2, 4\]; got \[2\]"),
    ({"lengths": torch.ones(3)}, TypeError, r"lengths must be int64; got torch.float32. Use lengths.long\(\)"),
    ({"lengths": torch.ones(3).long().to("meta")}, ValueError, r"lengths must be on cpu"),
    ({"lengths": torch.tensor([1, 0, 5])}, ValueError, r"lengths must be 1 to N=5; got 0"),
    ({"lengths": torch.tensor([1, 6, 5])}, ValueError, r"lengths must be 1 to N=5; got 6"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)
def test_refuses(backend, bad, error, message):
    good = {"query": QUERY, "key": KEY, "value": KEY, "lengths": torch.tensor([1, 5, 3])}
    pooled_attention(**good)
    with pytest.raises(error, match=rf"^pooled_attention: {message}"):
        pooled_attention(**{**good, **bad})


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, "drawn"], ids=["whole", "lengths"])
def test_graph_replays(lengths):
    """The lengths are not read on the host."""
    cases = [make(4, 197, 12, 64, torch.bfloat16, "cuda", lengths=lengths, seed=seed) for seed in (0, 1)]
    gpu.check_replays(
        lambda *inputs: result_and_gradients(kernel, cases[0]._replace(inputs=inputs)), *(case.inputs for case in cases)
    )


@pytest.mark.gpu
def test_inductor_compiles_with_any_shape():
    compiled = torch.compile(pooled_attention, fullgraph=True, dynamic=True)
    for shape in ((4, 197, 12, 64), (7, 50, 12, 64)):
        case = make(*shape, torch.bfloat16, "cuda")
        ours = result_and_gradients(lambda case: compiled(*case.inputs), case)
        assert all(torch.equal(a, b) for a, b in zip(ours, result_and_gradients(kernel, case), strict=True))


@pytest.mark.gpu
def test_runs_on_the_device_of_its_tensors():
    check_three_ways(make(4, 197, 12, 64, device=gpu.second_device()))
