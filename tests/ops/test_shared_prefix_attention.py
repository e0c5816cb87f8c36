"""shared_prefix_attention against fp64 and eager, through the public function and the operator."""

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
from skipkernels.functional import shared_prefix_attention
from skipkernels.ops.shared_prefix_attention import shared_prefix_attention as operator
from skipkernels.ops.shared_prefix_attention import shared_prefix_attention_backward as backward_operator
from skipkernels.testing import SLACK, relative_error
from tests.ops import gpu
from tests.ops.parameters import ids, pairs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("query", "prefix_key", "prefix_value", "suffix_key", "suffix_value")  # parts of packed and of its gradient


class Case(NamedTuple):
    inputs: tuple[Tensor]  # packed [R, 3W]
    options: dict

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
        """Fresh leaves."""
        inputs = (self.inputs[0].detach().to(device, dtype).requires_grad_(),)
        return Case(inputs, {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()})

    @property
    def width(self) -> int:
        return self.inputs[0].shape[1] // 3


def make(K, S, P, H, E, dtype=torch.float32, device="cpu", *, lengths=None, behind=0, seed=0, **options) -> Case:
    """Suffixes of S tokens, or packed suffixes of `lengths` and `behind` rows of NaN after them.

    Rounded to the dtype, so that all inputs are equal.
    """
    rng = torch.Generator().manual_seed(seed)
    options |= {"heads": H, "prefix_length": P, "max_length": S}
    tokens = P + (K * S if lengths is None else sum(lengths))
    if lengths is not None:
        options["offsets"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    packed = F.pad(torch.randn(tokens, 3 * H * E, generator=rng), (0, 0, 0, behind), value=torch.nan)
    return Case((packed,), options).to(dtype, device)


def kernel(case: Case) -> Tensor:
    return shared_prefix_attention(*case.inputs, **case.options)


def truth(case: Case) -> Tensor:
    return reference.shared_prefix_attention(*case.inputs, **case.options)


def bounds(case: Case) -> list[int]:
    """First row of each suffix, and the end."""
    P, S = case.options["prefix_length"], case.options["max_length"]
    if "offsets" in case.options:
        return (P + case.options["offsets"]).tolist()
    return list(range(P, len(case.inputs[0]) + 1, S))


def eager(case: Case) -> Tensor:
    """Eager PyTorch: the prefix, then each suffix separately, after the prefix."""
    (packed,), P = case.inputs, case.options["prefix_length"]
    parts = packed.unflatten(1, (3, case.options["heads"], -1)).transpose(0, 2)  # [H, 3, R, E]
    rows = []
    for begin, end in [(0, P), *itertools.pairwise(bounds(case))]:
        front = P if begin >= P else 0
        query, key, value = parts[:, :, begin:end].unbind(1)
        if front:
            key, value = (torch.cat([parts[:, i, :P], x], dim=1) for i, x in ((1, key), (2, value)))
        visible = torch.ones(end - begin, front + end - begin, dtype=torch.bool, device=packed.device).tril(front)
        attended = F.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=visible, scale=case.options.get("scale")
        )
        rows.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat([*rows, packed.new_zeros(len(packed) - bounds(case)[-1], case.width)])


def result_and_gradients(function, case: Case) -> list[Tensor]:
    """The result, and the gradients of the parts by NAMES."""
    out = function(case)
    d_out = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).sin().to(out)
    (d_packed,) = torch.autograd.grad(out, case.inputs, d_out)
    d_query, d_key, d_value = d_packed.split(case.width, dim=1)
    P = case.options["prefix_length"]
    return [out, d_query, d_key[:P], d_value[:P], d_key[P:], d_value[P:]]


def check_three_ways(case: Case) -> None:
    dtype = case.inputs[0].dtype
    exact = result_and_gradients(truth, case.to(torch.float64))
    ours, theirs = result_and_gradients(kernel, case), result_and_gradients(eager, case)
    for name, value, other, right in zip(("out", *NAMES), ours, theirs, exact, strict=True):
        assert value.dtype == dtype
        if right.numel() > 0:
            error, bound = (relative_error(x.cpu(), right) for x in (value, other))
            assert error <= bound + SLACK[dtype], f"{name}: {error:.2e} against eager's {bound:.2e}"
    if (end := bounds(case)[-1]) < len(case.inputs[0]):
        rows = len(case.inputs[0]) - end
        assert not any(x[-rows:].any() for x in (ours[0], ours[1], *ours[4:]))


SHAPES = [
    (1, 1, 1, 4, 1),  # four heads: a single number is more or less exact by luck
    (3, 5, 6, 2, 7),
    (14, 5, 6, 2, 64),
    (67, 1, 5, 1, 32),
    (9, 4, 0, 2, 16),
    (7, 11, 17, 1, 80),
    (3, 30, 33, 1, 48),  # a prefix of one row more than a tile
    (2, 69, 70, 1, 32),  # three tiles each
    (2, 13, 3, 1, 128),
    (4, 13, 3, 1, 130),  # wider than a tile
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


@pytest.mark.parametrize(("name", "dtype", "behind"), pairs(list(LENGTHS), DTYPES[:3], [0, 1, 70]), ids=ids(""))
def test_packed_suffixes_are_no_worse_than_eager(backend, name, dtype, behind):
    """Rows behind the last suffix are NaN: they are not read, and the result and the gradient are 0 there."""
    backend.skip_unless_supported(dtype)
    lengths = LENGTHS[name]
    check_three_ways(make(None, max(lengths), 6, 2, 16, dtype, backend.device, lengths=lengths, behind=behind))


def test_packed_equal_lengths_are_the_padded_form(backend):
    case = make(9, 4, 3, 2, 16, device=backend.device)
    offsets = torch.arange(0, 37, 4, device=backend.device)
    for longest in (4, 7, 50):  # max_length may exceed the longest suffix, and a tile
        packed = case._replace(options=case.options | {"offsets": offsets, "max_length": longest})
        for ours, theirs in zip(result_and_gradients(kernel, packed), result_and_gradients(kernel, case), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_prefix_is_causal_attention(backend):
    """A prefix of several tiles equals one suffix without a prefix."""
    case = make(None, 1, 75, 1, 16, device=backend.device, lengths=[0], behind=1)
    options = case.options | {"prefix_length": 0, "max_length": 75}
    alone = Case(case.inputs, options | {"offsets": torch.tensor([0, 75], device=backend.device)})
    for function in (lambda case: kernel(case), lambda case: torch.autograd.grad(kernel(case).sum(), case.inputs)[0]):
        assert torch.allclose(function(case), function(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_any_scale(backend, scale):
    check_three_ways(make(6, 5, 3, 2, 16, device=backend.device, scale=scale))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("deviation", [10, 30, 100, 300])
def test_no_worse_than_eager_at_any_deviation_of_scores(backend, deviation, dtype):
    """Queries and keys are multiples of 1/8, so that scores are exact; errors are those of softmax and its gradient."""
    backend.skip_unless_supported(dtype)
    case = make(30, 5, 6, 2, 16, device=backend.device)
    query, key, _ = case.inputs[0].data.split(case.width, dim=1)
    for part, factor in (query, deviation), (key, 1):
        part.mul_(8 * factor).round_().div_(8)
    check_three_ways(case.to(dtype, backend.device))


def test_large_products_neither_overflow_nor_underflow(backend):
    case = make(5, 4, 3, 2, 16, device=backend.device)
    case.inputs[0].data[:, : case.width].mul_(1000)
    exact = result_and_gradients(truth, case.to(torch.float64))
    for value, right in zip(result_and_gradients(kernel, case), exact, strict=True):
        # Products of 10⁴ have errors of 10⁻³; gradients vanish if one key has all the weight.
        assert (value.cpu() - right).abs().max() < 1e-3 * max(1.0, right.abs().max().item())


@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)  # a tile of a GPU has several classes
def test_nan_stays_in_its_class(backend):
    case = make(9, 5, 6, 2, 16, device=backend.device)
    clean = kernel(case)
    own = torch.arange(len(clean), device=backend.device).sub(6).div(5, rounding_mode="floor") == 4
    case.inputs[0].data[own] = torch.nan
    out = kernel(case)
    (d_packed,) = torch.autograd.grad(out, case.inputs, torch.ones_like(out))
    assert out[own].isnan().all() and torch.equal(out[~own], clean[~own])
    assert d_packed[6:][~own[6:]].isfinite().all()


@st.composite
def cases(draw) -> Case:
    K, S, P = draw(st.integers(1, 12)), draw(st.integers(1, 20)), draw(st.integers(0, 20))
    H, E = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 16, 31, 64]))
    lengths = draw(st.none() | st.lists(st.integers(0, S), min_size=1, max_size=K).filter(any))
    behind = draw(st.integers(0, 3)) if lengths else 0
    case = make(
        K, S, P, H, E, draw(st.sampled_from(DTYPES)), lengths=lengths, behind=behind, seed=draw(st.integers(0, 99))
    )
    if draw(st.booleans()):  # as columns of wider rows
        wide = F.pad(case.inputs[0].detach(), (2, 1), value=torch.nan)
        case = case._replace(inputs=(wide[:, 2:-1].requires_grad_(),))
    return case


@given(cases())
def test_every_shape_and_layout(case):
    check_three_ways(case)


@pytest.mark.parametrize("layout", ["wider rows", "transposed", "every other", "unaligned", "expanded"])
def test_any_strides(backend, layout):
    case = make(6, 5, 4, 2, 32, device=backend.device)
    packed = case.inputs[0].detach()
    if layout == "wider rows":
        packed = F.pad(packed, (5, 3), value=torch.nan)[:, 5:-3]
    elif layout == "transposed":
        packed = packed.mT.contiguous().mT
    elif layout == "every other":
        packed = torch.stack([packed, packed * torch.nan], dim=-1).flatten(-2)[..., ::2]
    elif layout == "unaligned":
        packed = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view(packed.shape)
    else:
        packed = packed[:1].expand(packed.shape)
    strided, plain = (
        case._replace(inputs=(x.requires_grad_(),))
        for x in (packed.detach(), packed.clone(memory_format=torch.contiguous_format))
    )
    tolerance = 1e-5 if backend.name == "reference" else 0  # BLAS sums in another order
    for ours, theirs in zip(result_and_gradients(kernel, strided), result_and_gradients(kernel, plain), strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_saved_for_backward():
    """The rows without a copy, and lse; not the result."""
    packed = F.pad(torch.randn(136, 3 * 512), (0, 8)).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        shared_prefix_attention(packed[:, :-8], heads=8, prefix_length=6, max_length=5)
    assert sorted((x.untyped_storage().data_ptr() == packed.data_ptr(), x.dtype, x.numel()) for x in saved) == [
        (False, torch.float64, 136 * 8),
        (True, torch.float32, 136 * 3 * 512),
    ]


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
    """Arguments of the operator."""
    options = case.options
    return *case.inputs, options["heads"], options["prefix_length"], options.get("offsets"), options["max_length"], 0.5


@pytest.mark.parametrize("lengths", [None, [2, 0, 3, 1]], ids=["padded", "packed"])
def test_opcheck(lengths):
    case = make(3, 3, 2, 2, 3, lengths=lengths)
    torch.library.opcheck(operator, arguments(case))
    packed, *rest = arguments(case)
    out, lse = operator(packed.detach(), *rest)
    torch.library.opcheck(backward_operator, (torch.ones_like(out), packed.detach(), lse, *rest))


def test_every_element_is_written(backend, poisoned_memory):
    """Unwritten results would be NaN."""
    case = make(None, 9, 6, 2, 16, device=backend.device, lengths=LENGTHS["any"], behind=40)
    assert all(x.isfinite().all() for x in result_and_gradients(kernel, case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_packed(dtype):
    case = make(6, 5, 4, 2, 16)
    with torch.autocast("cpu", dtype=dtype):
        out = kernel(case)
    assert torch.equal(out, kernel(case.to(dtype)))
    assert torch.autograd.grad(out.sum(), case.inputs)[0].dtype == torch.float32
    in_fp64 = case.to(torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(kernel(in_fp64), kernel(in_fp64.to(torch.float64)))


def test_compiles_into_one_graph():
    def step(packed, P, S, offsets):
        out = shared_prefix_attention(packed * 2, heads=2, prefix_length=P, max_length=S)
        return out + shared_prefix_attention(packed, heads=2, prefix_length=P, max_length=S, offsets=offsets)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for K, S, P in ((6, 5, 4), (9, 3, 2)):
        case, offsets = make(K, S, P, 2, 16), torch.arange(0, K * S + 1, S)
        ours, theirs = (f(*case.inputs, P, S, offsets) for f in (compiled, step))
        assert torch.equal(ours, theirs)
        gradients = (torch.autograd.grad(x.sum(), case.inputs) for x in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


GOOD = {"packed": torch.randn(8, 24), "heads": 2, "prefix_length": 2, "max_length": 3}
OFFSETS = {"offsets": torch.tensor([0, 1, 5]), "max_length": 5}
BAD = [
    ({"packed": torch.randn(8, 2, 12)}, ValueError, r"packed must be \[R, 3W\] with R, 3W ≥ 1; got \[8, 2, 12\]"),
    ({"packed": torch.randn(0, 24)}, ValueError, r"packed must be \[R, 3W\] with R, 3W ≥ 1; got \[0, 24\]"),
    ({"packed": torch.ones(8, 24).long()}, TypeError, r"packed must be float32, .* got torch.int64"),
    ({"heads": 0}, ValueError, r"heads must divide W, with packed \[R, 3W\]; got 0 and \[8, 24\]"),
    ({"heads": 3}, ValueError, r"heads must divide W, with packed \[R, 3W\]; got 3 and \[8, 24\]"),
    ({"prefix_length": -1}, ValueError, r"prefix_length must be 0 to 7, with packed \[8, 24\]; got -1"),
    ({"prefix_length": 8}, ValueError, r"prefix_length must be 0 to 7, .* got 8"),
    ({"max_length": 0}, ValueError, r"max_length must be at least 1; got 0"),
    ({"max_length": 4}, ValueError, r"max_length must divide the 6 rows behind the prefix; got 4. Pass offsets"),
    ({"offsets": torch.tensor([6])}, ValueError, r"offsets must be \[K \+ 1\] with K ≥ 1; got \[1\]"),
    ({"offsets": torch.tensor([0, 6]).int()}, TypeError, r"offsets must be int64; got torch.int32"),
    ({"offsets": torch.tensor([0, 6]).to("meta")}, ValueError, r"offsets must be on cpu"),
    (
        OFFSETS | {"offsets": torch.tensor([0, 5, 7])},
        ValueError,
        r"offsets must go from 0 to at most 6.*; got 0 to 7",
    ),
    (OFFSETS | {"offsets": torch.tensor([1, 6])}, ValueError, r"offsets must go from 0 to at most 6.*; got 1 to 6"),
    (
        OFFSETS | {"offsets": torch.tensor([0, 6])},
        ValueError,
        r"offsets must rise by 0 to max_length \(5\); .* 6 t",
    ),
    (OFFSETS | {"offsets": torch.tensor([0, 4, 3])}, ValueError, r"offsets must rise by 0 to .*; got .* -1 tokens"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)
def test_refuses(backend, bad, error, message):
    shared_prefix_attention(**GOOD)
    shared_prefix_attention(**GOOD | OFFSETS)
    with pytest.raises(error, match=rf"^shared_prefix_attention: {message}"):
        shared_prefix_attention(**GOOD | bad)


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
    compiled = torch.compile(shared_prefix_attention, fullgraph=True, dynamic=True)
    for shape in ((26, 5, 6, 8, 64), (77, 7, 5, 8, 64)):
        case = make(*shape, torch.bfloat16, "cuda")
        ours = result_and_gradients(lambda case: compiled(*case.inputs, **case.options), case)
        assert all(torch.equal(a, b) for a, b in zip(ours, result_and_gradients(kernel, case), strict=True))


@pytest.mark.gpu
def test_runs_on_the_device_of_its_tensors():
    check_three_ways(make(26, 5, 6, 8, 64, device=gpu.second_device()))


@pytest.mark.gpu
def test_more_suffixes_than_32_bits_count_numbers():
    """4.3 billion numbers of strided rows: offsets pass 2³¹."""
    K, S, P, E = 1 << 17, 8, 5, 16
    packed = torch.zeros(P + K * S, 4096, dtype=torch.bfloat16, device="cuda")[:, : 3 * E]
    packed[:P], packed[-S:] = torch.randn(P, 3 * E), torch.randn(S, 3 * E)
    options = {"heads": 1, "prefix_length": P, "max_length": S}
    whole = shared_prefix_attention(packed, **options)
    last = shared_prefix_attention(torch.cat([packed[:P], packed[-S:]]), **options)
    assert torch.equal(whole[-S:], last[P:])
