"""shared_prefix_attention: the shared tests, packed suffixes, and scores of any size."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from skipkernels.functional import shared_prefix_attention
from tests.ops.backends import Backend
from tests.ops.harness import Case, Operator, Results, shared_tests


def make(K, S, P, H, E, *, dtype, lengths=None, behind=0, seed=0, **options) -> Case:
    """Suffixes of S tokens, or packed suffixes of `lengths` and `behind` rows of NaN after them."""
    rng = torch.Generator().manual_seed(seed)
    options |= {"heads": H, "prefix_length": P, "max_length": S}
    tokens = P + (K * S if lengths is None else sum(lengths))
    if lengths is not None:
        options["offsets"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    packed = F.pad(torch.randn(tokens, 3 * H * E, generator=rng), (0, 0, 0, behind), value=torch.nan)
    return Case({"packed": packed.to(dtype).requires_grad_()}, options)


def bounds(packed, prefix_length, max_length, offsets=None, **_) -> list[int]:
    """First row of each suffix, and the end."""
    if offsets is not None:
        return (prefix_length + offsets).tolist()
    return list(range(prefix_length, len(packed) + 1, max_length))


def eager(packed, heads, prefix_length, max_length, offsets=None, scale=None):
    """The prefix, then each suffix separately, after the prefix."""
    P, rows = prefix_length, bounds(packed, prefix_length, max_length, offsets)
    parts = packed.unflatten(1, (3, heads, -1)).transpose(0, 2)  # [H, 3, R, E]
    results = []
    for begin, end in [(0, P), *itertools.pairwise(rows)]:
        front = P if begin >= P else 0
        query, key, value = parts[:, :, begin:end].unbind(1)
        if front:
            key, value = (torch.cat([parts[:, i, :P], x], dim=1) for i, x in ((1, key), (2, value)))
        visible = torch.ones(end - begin, front + end - begin, dtype=torch.bool, device=packed.device).tril(front)
        attended = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=visible, scale=scale)
        results.append(attended[0].transpose(0, 1).flatten(1))
    return torch.cat([*results, packed.new_zeros(len(packed) - rows[-1], packed.shape[1] // 3)])


def parts(case: Case, results: Results) -> Results:
    """The gradients of queries, prefix and suffixes, which have different sizes; of the rows that are not empty."""
    P, d_query, d_key, d_value = case.options["prefix_length"], *results["d_packed"].chunk(3, dim=1)
    found = {"out": results["out"], "d_query": d_query}
    found |= {"d_prefix_key": d_key[:P], "d_prefix_value": d_value[:P]}
    found |= {"d_suffix_key": d_key[P:], "d_suffix_value": d_value[P:]}
    return {name: x for name, x in found.items() if x.numel() > 0}


PACKED = {"lengths": [2, 0, 3, 1], "behind": 2}

OPERATOR = Operator(
    name="shared_prefix_attention",
    make=make,
    eager=eager,
    sizes="K S P H E",
    shapes=[
        (1, 1, 1, 4, 1),  # four heads: a single number is more or less exact by luck
        (3, 5, 6, 2, 7),
        (14, 5, 6, 2, 64),
        (9, 4, 0, 2, 16),
        (67, 1, 5, 1, 32),
        (7, 11, 17, 1, 80),
        (3, 30, 33, 1, 48),  # a prefix of one row more than a tile
        (2, 69, 70, 1, 32),  # three tiles each
        (2, 13, 3, 1, 128),
        (3, 17, 5, 1, 72),  # suffixes of one row more than a tile of wide heads
        (4, 13, 3, 1, 130),  # wider than a tile
    ],
    small=(5, 3, 4, 2, 16),
    large=[(26, 5, 6, 8, 64), (700, 5, 6, 4, 64), (90, 30, 70, 3, 40)],
    features=("packed",),
    variants=[{}, PACKED],
    parts=parts,
    too_slow=lambda K, S, P, H, E: K * S * H > 100,
    saves=lambda case: [len(case.inputs["packed"]) * 2],  # lse; not the result
)

TestSharedPrefixAttention = shared_tests(OPERATOR)

LENGTHS = {
    "one": [7],
    "ones": [1] * 70,
    "any": [3, 1, 9, 2, 2, 5, 1, 1, 8, 4, 9, 9, 1],
    "empty ones": [0, 4, 0, 0, 2, 0],
    "long": [2, 40, 3],
}


@pytest.mark.parametrize("name", LENGTHS)
def test_packed_suffixes_are_no_worse_than_eager(backend: Backend, name):
    """Rows behind the last suffix are NaN: they are not read, and the result and the gradient are 0 there."""
    lengths = LENGTHS[name]
    dtypes = backend.dtypes[:1] if backend.name == "interpreter" else backend.dtypes
    for dtype, behind in zip(dtypes, itertools.cycle([1, 70, 0]), strict=False):
        shape, options = (None, max(lengths), 6, 2, 16), {"lengths": lengths, "behind": behind}
        case = OPERATOR.case(shape, backend.device, dtype=dtype, **options)
        OPERATOR.check_no_worse_than_eager(case)
        found = OPERATOR.kernel(case)
        assert not any(x[6 + sum(lengths) :].any() for x in found.values())


def test_packed_equal_lengths_are_the_padded_form(backend: Backend):
    case = OPERATOR.case((9, 4, 3, 2, 16), backend.device)
    padded, offsets = OPERATOR.kernel(case), torch.arange(0, 37, 4, device=backend.device)
    for longest in (4, 50):  # max_length may exceed the longest suffix, and a tile
        options = case.options | {"offsets": offsets, "max_length": longest}
        for name, x in OPERATOR.kernel(case._replace(options=options)).items():
            assert torch.allclose(x, padded[name], rtol=1e-5, atol=1e-6), name


def test_prefix_is_causal_attention(backend: Backend):
    """A prefix of several tiles equals one suffix without a prefix."""
    case = OPERATOR.case((None, 1, 75, 1, 16), backend.device, lengths=[0], behind=1)
    options = {"prefix_length": 0, "max_length": 75, "offsets": torch.tensor([0, 75], device=backend.device)}
    alone = OPERATOR.kernel(case._replace(options=case.options | options))
    for name, x in OPERATOR.kernel(case).items():
        assert torch.allclose(x, alone[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)  # a tile of a GPU has several classes
def test_nan_stays_in_its_class(backend: Backend):
    case = OPERATOR.case((9, 5, 6, 2, 16), backend.device)
    clean = OPERATOR.kernel(case)["out"]
    own = torch.arange(len(clean)).sub(6).div(5, rounding_mode="floor") == 4
    case.inputs["packed"].data[own] = torch.nan
    found = OPERATOR.kernel(case)
    assert found["out"][own].isnan().all() and torch.equal(found["out"][~own], clean[~own])
    assert found["d_packed"][6:][~own[6:]].isfinite().all()


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
