"""pooled_attention: the shared tests, lengths, and scores of any size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from skipkernels.functional import pooled_attention
from tests.ops.conftest import Backend
from tests.ops.harness import Case, Operator, shared_tests


def make(B, N, H, E, *, dtype, seed=0, lengths=None, **options) -> Case:
    """Random `lengths` if "drawn"."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {"query": (B, H, E), "key": (B, N, H, E), "value": (B, N, H, E)}
    inputs = {name: torch.randn(shape, generator=rng).to(dtype).requires_grad_() for name, shape in shapes.items()}
    if lengths is not None:
        options["lengths"] = torch.randint(1, N + 1, (B,), generator=rng)
    return Case(inputs, options)


def eager(query, key, value, lengths=None, scale=None):
    mask = None
    if lengths is not None:
        mask = (torch.arange(key.shape[1], device=key.device) < lengths[:, None])[:, None, None]
    q, k, v = query[:, :, None], key.transpose(1, 2), value.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[:, :, 0]


def draw(data: st.DataObject, backend: Backend) -> Case:
    case = make(
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(2, 70)),
        data.draw(st.integers(1, 5)),
        data.draw(st.sampled_from([2, 7, 16, 31, 64])),
        dtype=data.draw(st.sampled_from(backend.dtypes)),
        lengths=data.draw(st.sampled_from([None, "drawn"])),
        seed=data.draw(st.integers(0, 99)),
    )
    if data.draw(st.booleans()):  # as parts of one projection
        key, value = torch.stack([case.inputs[name].detach() for name in ("key", "value")], dim=2).unbind(2)
        case = case.with_inputs(key=key, value=value)
    return case


OPERATOR = Operator(
    name="pooled_attention",
    make=make,
    eager=eager,
    sizes="B N H E",
    shapes=[
        (1, 2, 1, 2),
        (3, 7, 2, 7),
        (26, 11, 2, 64),
        (2, 33, 3, 80),  # one more than a block of keys
        (4, 197, 3, 64),
        (1, 577, 2, 96),
        (5, 77, 1, 128),
        (2, 13, 1, 130),  # one more than a block of head width
    ],
    small=(3, 9, 2, 16),
    large=[(4, 197, 12, 64), (1, 3000, 5, 40)],
    features=("query", "key", "value"),
    variants=[{}, {"lengths": "drawn"}],
    draw=draw,
    too_slow=lambda B, N, H, E: B * H * N > 1200,
    saves=lambda case: [case.inputs["query"].numel(), case.inputs["query"][..., 0].numel()],  # the result, and lse
)

TestPooledAttention = shared_tests(OPERATOR)


def test_no_worse_than_eager_with_lengths(backend: Backend):
    for shape in OPERATOR.shapes[1:4]:
        for dtype in backend.dtypes:
            OPERATOR.check_no_worse_than_eager(OPERATOR.case(shape, backend.device, dtype=dtype, lengths="drawn"))


def test_lengths_with_strides(backend: Backend):
    case = OPERATOR.case((4, 40, 2, 16), backend.device, lengths="drawn")
    exact = OPERATOR.kernel(case)
    strided = case.options["lengths"].repeat_interleave(2)[::2]
    found = OPERATOR.kernel(case._replace(options={"lengths": strided}))
    assert all(torch.equal(x, exact[name]) for name, x in found.items())


def test_one_key_returns_its_value(backend: Backend):
    case = OPERATOR.case((3, 1, 2, 16), backend.device)
    found = OPERATOR.kernel(case)
    assert torch.equal(found["out"], case.inputs["value"][:, 0]) and found["d_value"].any()
    for name in ("d_query", "d_key"):  # the weight is 1 whatever the score is
        assert found[name].abs().max() < 1e-6


@pytest.mark.parametrize("scale", [0.0, -0.3, 0.5])
def test_any_scale(backend: Backend, scale):
    OPERATOR.check_no_worse_than_eager(OPERATOR.case((2, 35, 2, 16), backend.device, scale=scale))


@pytest.mark.parametrize("deviation", [10, 300])
def test_no_worse_than_eager_at_any_deviation_of_scores(backend: Backend, deviation):
    """Queries and keys are multiples of 1/8, so that scores are exact; errors are those of softmax and its gradient."""
    case = OPERATOR.case((24, 12, 2, 16), backend.device)
    for name, factor in ("query", deviation), ("key", 1):
        case.inputs[name].data.mul_(8 * factor).round_().div_(8)
    for dtype in {torch.float32, torch.bfloat16} & set(backend.dtypes):
        OPERATOR.check_no_worse_than_eager(case.to(dtype))


def test_large_products_neither_overflow_nor_underflow(backend: Backend):
    case = OPERATOR.case((3, 40, 2, 16), backend.device)
    case.inputs["query"].data.mul_(1000)
    found = OPERATOR.kernel(case)
    for name, right in OPERATOR.truth(case).items():
        # Products of 10⁴ have errors of 10⁻³; gradients vanish if one key has all the weight.
        assert (found[name] - right).abs().max() < 1e-3 * max(1.0, right.abs().max().item()), name


def test_keys_past_the_length_are_ignored(backend: Backend):
    case = OPERATOR.case((4, 70, 2, 16), backend.device, lengths="drawn")
    clean = OPERATOR.kernel(case)
    past = torch.arange(70, device=backend.device) >= case.options["lengths"][:, None]
    for name in ("key", "value"):
        case.inputs[name].data[past] = torch.nan
    spoilt = OPERATOR.kernel(case)
    assert all(torch.equal(x, spoilt[name]) for name, x in clean.items())
    assert not spoilt["d_key"][past].any() and not spoilt["d_value"][past].any()


QUERY, KEY = torch.randn(3, 2, 4), torch.randn(3, 5, 2, 4)
BAD = [
    ({"query": KEY}, ValueError, r"query must be \[B, H, E\] with B, H, E ≥ 1; got \[3, 5, 2, 4\]"),
    ({"key": KEY[:, :0]}, ValueError, r"key must be \[B=3, N, H=2, E=4\] with N ≥ 1 to match query .*; got \[3, 0"),
    ({"key": KEY.half()}, TypeError, r"key must be float32; got torch.float16. Convert one"),
    ({"value": KEY[:, :4]}, ValueError, r"value must be \[B=3, N=5, H=2, E=4\] to match query .*; got \[3, 4"),
    ({"lengths": torch.tensor([1, 2])}, ValueError, r"lengths must be \[B=3\] to match query \[3, 2, 4\]; got \[2\]"),
    ({"lengths": torch.tensor([1, 0, 5])}, ValueError, r"lengths must be 1 to N=5; got 0"),
    ({"lengths": torch.tensor([1, 6, 5])}, ValueError, r"lengths must be 1 to N=5; got 6"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)
def test_refuses(backend: Backend, bad, error, message):
    good = {"query": QUERY, "key": KEY, "value": KEY, "lengths": torch.tensor([1, 5, 3])}
    pooled_attention(**good)
    with pytest.raises(error, match=rf"^pooled_attention: {message}"):
        pooled_attention(**{**good, **bad})
