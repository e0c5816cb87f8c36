"""suffix_attention against fp64 and eager, through the public function and the operator."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipkernels import reference
from skipkernels.functional import suffix_attention
from skipkernels.ops.suffix_attention import suffix_attention as operator
from skipkernels.ops.suffix_attention import suffix_attention_backward as backward_operator
from skipkernels.testing import SLACK, relative_error
from tests.ops import gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("query", "prefix_key", "prefix_value", "suffix_key", "suffix_value")


class Case(NamedTuple):
    inputs: tuple[Tensor, ...]  # by NAMES
    options: dict

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """Fresh leaves."""
        inputs = tuple(x.detach().to(device, dtype).requires_grad_() for x in self.inputs)
        return Case(inputs, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()})


def make(K, S, P, H, E, dtype=torch.float32, device="cpu", *, lengths=None, seed=0, **options) -> Case:
    """Suffixes of S tokens, or packed suffixes of `lengths`; rounded to the dtype, so that all inputs are equal."""
    rng = torch.Generator().manual_seed(seed)
    tokens = (K, S)
    if lengths is not None:
        options["offsets"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        options["max_length"] = S
        tokens = (sum(lengths),)
    shapes = ((*tokens, H, E), (P, H, E), (P, H, E), (*tokens, H, E), (*tokens, H, E))
    inputs = tuple(torch.randn(shape, generator=rng) for shape in shapes)
    return Case(inputs, options).to(dtype, device)


def kernel(case: Case) -> Tensor:
    return suffix_attention(*case.inputs, **case.options)


def truth(case: Case) -> Tensor:
    return reference.suffix_attention(*case.inputs, **case.options)


def eager(case: Case) -> Tensor:
    """Eager PyTorch: each suffix separately, after the prefix."""
    query, prefix_key, prefix_value, suffix_key, suffix_value = case.inputs
    bounds = [0, *itertools.accumulate([query.shape[1]] * query.shape[0])]
    if "offsets" in case.options:
        bounds = case.options["offsets"].tolist()
    else:
        query, suffix_key, suffix_value = (x.flatten(0, 1) for x in (query, suffix_key, suffix_value))
    rows, P = [], prefix_key.shape[0]
    for begin, end in itertools.pairwise(bounds):
        key, value = torch.cat([prefix_key, suffix_key[begin:end]]), torch.cat([prefix_value, suffix_value[begin:end]])
        mask = torch.ones(end - begin, len(key), dtype=torch.bool, device=query.device).tril(P)
        q, k, v = (x.transpose(0, 1)[None] for x in (query[begin:end], key, value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.options.get("scale"))
        rows.append(attended[0].transpose(0, 1))
    return torch.cat(rows).view(case.inputs[0].shape)


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
    (1, 1, 1, 4, 1),  # four heads: a single number is more or less exact by luck
    (3, 5, 6, 2, 7),
    (14, 5, 6, 2, 64),
    (67, 1, 5, 1, 32),
    (7, 11, 17, 1, 80),
    (3, 30, 33, 1, 48),
    (2, 61, 70, 1, 32),
    (4, 13, 3, 1, 130),  # one more than a block of head width
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "K{}-S{}-P{}-H{}-E{}".format(*s))
def test_no_worse_than_eager(backend, shape, dtype):
    backend.skip_unless_supported(dtype)
    check_three_ways(make(*shape, dtype, backend.device))


LENGTHS = {
    "one": [7],
    "ones": [1] * 70,
    "any": [3, 1, 9, 2, 2, 5, 1, 1, 8, 4, 9, 9, 1],
    "empty ones": [0, 4, 0, 0, 2, 0],
    "long": [2, 40, 3],
}


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_suffixes_are_no_worse_than_eager(backend, lengths, dtype):
    backend.skip_unless_supported(dtype)
    check_three_ways(make(None, max(lengths), 6, 2, 16, dtype, backend.device, lengths=lengths))


def test_packed_equal_lengths_are_the_padded_form(backend):
    case = make(9, 4, 3, 2, 16, device=backend.device)
    query, prefix_key, prefix_value, suffix_key, suffix_value = case.inputs
    packed = [x.flatten(0, 1) for x in (query, suffix_key, suffix_value)]
    offsets = torch.arange(0, 37, 4, device=backend.device)
    for longest in (4, 7):  # max_length may exceed the longest suffix
        out = suffix_attention(packed[0], prefix_key, prefix_value, *packed[1:], offsets=offsets, max_length=longest)
        assert torch.allclose(out.view(query.shape), kernel(case), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_any_scale(backend, scale):
    check_three_ways(make(6, 5, 3, 2, 16, device=backend.device, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("deviation", [10, 30, 100, 300])
def test_no_worse_than_eager_at_any_deviation_of_scores(backend, deviation, dtype):
    """Queries and keys are multiples of 1/8, so that scores are exact; errors are those of softmax and its gradient."""
    backend.skip_unless_supported(dtype)
    case = make(30, 5, 6, 2, 16, device=backend.device)
    for i, factor in (0, deviation), (1, 1), (3, 1):
        case.inputs[i].data.mul_(8 * factor).round_().div_(8)
    check_three_ways(case.to(dtype, backend.device))


def test_large_products_neither_overflow_nor_underflow(backend):
    case = make(5, 4, 3, 2, 16, device=backend.device)
    case.inputs[0].data.mul_(1000)
    exact = result_and_gradients(truth, case.to(torch.float64))
    for value, right in zip(result_and_gradients(kernel, case), exact, strict=True):
        # Products of 10⁴ have errors of 10⁻³; gradients vanish if one key has all the weight.
        assert (value.cpu() - right).abs().max() < 1e-3 * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)  # a tile of a GPU has several classes
def test_nan_stays_in_its_class(backend):
    case = make(9, 5, 6, 2, 16, device=backend.device)
    clean = kernel(case)
    for x in case.inputs[0], *case.inputs[3:]:
        x.data[4] = torch.nan
    out = kernel(case)
    gradients = torch.autograd.grad(out, case.inputs, torch.ones_like(out))
    others = torch.arange(9, device=backend.device) != 4
    assert out[4].isnan().all() and torch.equal(out[others], clean[others])
    assert all(gradients[i][others].isfinite().all() for i in (0, 3, 4))


@st.composite
def cases(draw) -> Case:
    K, S, P = draw(st.integers(1, 12)), draw(st.integers(1, 20)), draw(st.integers(1, 20))
    H, E = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 16, 31, 64]))
    lengths = draw(st.none() | st.lists(st.integers(0, S), min_size=1, max_size=K).filter(any))
    dtype = draw(st.sampled_from(DTYPES))
    case = make(K, S, P, H, E, dtype, lengths=lengths, seed=draw(st.integers(0, 99)))
    if draw(st.booleans()):  # as parts of one projection
        names = [0, 3, 4]
        together = torch.stack([case.inputs[i].detach() for i in names], dim=-3)
        parts = dict(zip(names, together.unbind(-3), strict=True))
        case = case._replace(inputs=tuple(parts.get(i, x).detach().requires_grad_() for i, x in enumerate(case.inputs)))
    return case


@given(cases())
def test_every_shape_and_layout(case):
    check_three_ways(case)


@pytest.mark.parametrize(
    "layout", ["packed projection", "heads first", "transposed", "every other", "unaligned", "expanded"]
)
def test_any_strides(backend, layout):
    case = make(6, 5, 4, 2, 32, device=backend.device)

    def lay_out(x: Tensor) -> Tensor:
        if layout == "packed projection":
            return torch.stack([x * torch.nan, x, x * torch.nan], dim=-3).unbind(-3)[1]
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


def test_a_packed_projection_is_not_copied(monkeypatch):
    projection = torch.randn(26, 5, 3, 8, 64, requires_grad=True)
    prefix = torch.randn(6, 2, 8, 64)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        query, key, value = projection.unbind(2)
        suffix_attention(query, *prefix.unbind(1), key, value)
    own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    out, lse = 26 * 5 * 8 * 64, 26 * 5 * 8
    assert sum(own.values()) == 4 * (projection.numel() + prefix.numel() + out) + 8 * lse


@pytest.mark.parametrize("shape", [(26, 5, 6, 8, 64), (700, 5, 6, 4, 64), (90, 30, 70, 3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(result_and_gradients(kernel, make(*shape, dtype)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("lengths", [None, [2, 0, 3, 1]], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)
def test_gradcheck(backend, lengths):
    case = make(3, 3, 2, 2, 3, torch.float64, lengths=lengths)
    assert torch.autograd.gradcheck(lambda *inputs: kernel(case._replace(inputs=inputs)), case.inputs)


def arguments(case: Case) -> tuple:
    """Results and gradients of the operator."""
    query, prefix_key, prefix_value, suffix_key, suffix_value = case.inputs
    if "offsets" in case.options:
        return (*case.inputs, case.options["offsets"], case.options["max_length"], 0.5)
    q, k, v = (x.flatten(0, 1).detach().requires_grad_() for x in (query, suffix_key, suffix_value))
    return q, prefix_key, prefix_value, k, v, None, query.shape[1], 0.5


@pytest.mark.parametrize("lengths", [None, [2, 0, 3, 1]], ids=["padded", "packed"])
def test_opcheck(lengths):
    case = make(3, 3, 2, 2, 3, lengths=lengths)
    torch.library.opcheck(operator, arguments(case))
    inputs, rest = [x.detach() for x in arguments(case)[:5]], arguments(case)[5:]
    out, lse = operator(*inputs, *rest)
    for needs in [(True,) * 5, (False,) * 5, (True, False, False, False, False), (False, True, False, True, False)]:
        torch.library.opcheck(backward_operator, (torch.ones_like(out), *inputs, out, lse, *rest, *needs))


WANTED = [{0}, {1}, {2}, {3}, {4}, {1, 2}, {0, 3, 4}, {1, 3}, {0, 2, 4}]


@pytest.mark.parametrize("wanted", WANTED, ids=lambda wanted: "-".join(NAMES[i] for i in sorted(wanted)))
def test_only_needed_gradients_are_computed(backend, wanted, monkeypatch):
    case = make(5, 4, 3, 2, 16, device=backend.device)
    everything = result_and_gradients(kernel, case)[1:]
    case = case._replace(inputs=tuple(x.detach().requires_grad_(i in wanted) for i, x in enumerate(case.inputs)))
    calls = []
    monkeypatch.setattr(
        "skipkernels.ops.suffix_attention.suffix_attention_backward",
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
    case = make(None, 9, 6, 2, 16, device=backend.device, lengths=LENGTHS["any"])
    assert all(x.isfinite().all() for x in result_and_gradients(kernel, case))


def test_second_backward_gives_equal_gradients(backend):
    case = make(26, 5, 6, 2, 16, device=backend.device)
    out = kernel(case)
    once, twice = (torch.autograd.grad(out, case.inputs, torch.ones_like(out), retain_graph=True) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_double_backward_is_an_error():
    case = make(3, 2, 2, 1, 4)
    (d_query,) = torch.autograd.grad(kernel(case).sum(), case.inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"suffix_attention_backward: the gradient of a gradient is not implemented"):
        d_query.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_all_inputs(dtype):
    case = make(6, 5, 4, 2, 16)
    mixed = case._replace(inputs=(case.inputs[0].detach().to(dtype).requires_grad_(), *case.inputs[1:]))
    with torch.autocast("cpu", dtype=dtype):
        out = kernel(mixed)
    assert torch.equal(out, kernel(case.to(dtype)))
    assert torch.autograd.grad(out.sum(), mixed.inputs[1])[0].dtype == torch.float32
    in_fp64 = case.to(torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(kernel(in_fp64), kernel(in_fp64.to(torch.float64)))


def test_compiles_into_one_graph():
    def step(query, prefix_key, prefix_value, suffix_key, suffix_value, offsets, max_length):
        out = suffix_attention(query * 2, prefix_key, prefix_value, suffix_key, suffix_value)
        packed = [x.flatten(0, 1) for x in (query, suffix_key, suffix_value)]
        return out.flatten(0, 1) + suffix_attention(
            packed[0], prefix_key, prefix_value, *packed[1:], offsets=offsets, max_length=max_length
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for K, S, P in ((6, 5, 4), (9, 3, 2)):
        case = make(K, S, P, 2, 16)
        packing = torch.arange(0, K * S + 1, S), S
        ours, theirs = compiled(*case.inputs, *packing), step(*case.inputs, *packing)
        assert torch.equal(ours, theirs)
        gradients = (torch.autograd.grad(x.sum(), case.inputs) for x in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


QUERY, PREFIX, SUFFIX = torch.randn(3, 2, 2, 4), torch.randn(5, 2, 4), torch.randn(3, 2, 2, 4)
PACKED = {name: torch.randn(6, 2, 4) for name in ("query", "suffix_key", "suffix_value")} | {
    "offsets": torch.tensor([0, 1, 6]),
    "max_length": 5,
}
BAD = [
    ({"query": QUERY[0]}, ValueError, r"query must be \[K, S, H, E\] with K, S, H, E ≥ 1; got \[2, 2, 4\]"),
    ({"query": QUERY.long()}, TypeError, r"query must be float32, .* got torch.int64"),
    (
        {"prefix_key": PREFIX[:0]},
        ValueError,
        r"prefix_key must be \[P, H=2, E=4\] with P ≥ 1 to match query .*; got \[0",
    ),
    ({"prefix_value": PREFIX[:4]}, ValueError, r"prefix_value must be \[P=5, H=2, E=4\] .*; got \[4, 2, 4\]"),
    ({"prefix_value": PREFIX.double()}, TypeError, r"prefix_value must be float32; got torch.float64. Convert one"),
    ({"suffix_key": SUFFIX[:2]}, ValueError, r"suffix_key must be \[K=3, S=2, H=2, E=4\] .*; got \[2, 2, 2, 4\]"),
    ({"suffix_value": SUFFIX.to("meta")}, ValueError, r"suffix_value must be on cpu, where query is; got meta"),
    ({"max_length": 3}, ValueError, r"offsets and max_length must be given together; got only max_length"),
    (PACKED | {"query": QUERY}, ValueError, r"query must be \[T, H, E\]"),
    (PACKED | {"max_length": None}, ValueError, r"offsets and max_length must be given together; got only offsets"),
    (PACKED | {"max_length": 0}, ValueError, r"max_length must be at least 1; got 0"),
    (PACKED | {"offsets": torch.tensor([6])}, ValueError, r"offsets must be \[K \+ 1\] with K ≥ 1; got \[1\]"),
    (PACKED | {"offsets": torch.tensor([0, 6]).int()}, TypeError, r"offsets must be int64; got torch.int32"),
    (PACKED | {"offsets": torch.tensor([0, 6]).to("meta")}, ValueError, r"offsets must be on cpu"),
    (PACKED | {"offsets": torch.tensor([0, 5])}, ValueError, r"offsets must go from 0 to 6, .*; got 0 to 5"),
    (PACKED | {"offsets": torch.tensor([1, 6])}, ValueError, r"offsets must go from 0 to 6, .*; got 1 to 6"),
    (
        PACKED | {"offsets": torch.tensor([0, 6])},
        ValueError,
        r"offsets must rise by 0 to max_length \(5\); got .* 6 tok",
    ),
    (PACKED | {"offsets": torch.tensor([0, 4, 3, 6])}, ValueError, r"offsets must rise by 0 to .*; got .* -1 tokens"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)
def test_refuses(backend, bad, error, message):
    good = dict(zip(NAMES, (QUERY, PREFIX, PREFIX, SUFFIX, SUFFIX), strict=True))
    suffix_attention(**good)
    suffix_attention(**{**good, **PACKED})
    with pytest.raises(error, match=rf"^suffix_attention: {message}"):
        suffix_attention(**{**good, **bad})


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, LENGTHS["any"]], ids=["padded", "packed"])
def test_graph_replays(lengths):
    """The offsets are not read on the host."""
    cases = [make(90, 9, 6, 8, 64, torch.bfloat16, "cuda", lengths=lengths, seed=seed) for seed in (0, 1)]
    gpu.check_replays(
        lambda *inputs: result_and_gradients(kernel, cases[0]._replace(inputs=inputs)), *(case.inputs for case in cases)
    )


@pytest.mark.gpu
def test_inductor_compiles_with_any_shape():
    compiled = torch.compile(suffix_attention, fullgraph=True, dynamic=True)
    for shape in ((26, 5, 6, 8, 64), (77, 7, 5, 8, 64)):
        case = make(*shape, torch.bfloat16, "cuda")
        ours = result_and_gradients(lambda case: compiled(*case.inputs), case)
        assert all(torch.equal(a, b) for a, b in zip(ours, result_and_gradients(kernel, case), strict=True))


@pytest.mark.gpu
def test_runs_on_the_device_of_its_tensors():
    check_three_ways(make(26, 5, 6, 8, 64, device=gpu.second_device()))


@pytest.mark.gpu
def test_more_suffixes_than_32_bits_count_numbers():
    """4.3 billion numbers of a strided query: offsets pass 2³¹."""
    K, S, H, E = 1 << 17, 8, 1, 16
    projection = torch.zeros(K * S, 256, H, E, dtype=torch.bfloat16, device="cuda")
    query, key, value = (projection[:, i].unflatten(0, (K, S)) for i in range(3))
    projection[-S:, :3] = torch.randn(S, 3, H, E, dtype=torch.bfloat16, device="cuda")
    prefix = torch.randn(2, 5, H, E, dtype=torch.bfloat16, device="cuda")
    whole = suffix_attention(query, *prefix, key, value)
    last = suffix_attention(query[-1:], *prefix, key[-1:], value[-1:])
    assert torch.equal(whole[-1:], last)
