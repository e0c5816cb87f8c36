"""pooled_attention: the shared tests, and a single key."""

from __future__ import annotations

import torch

from bench.operators.pooled_attention import eager
from tests.ops.backends import Backend
from tests.ops.harness import Case, Operator, shared_tests


def make(B, N, H, E, *, dtype, seed=0, **options) -> Case:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"query": (B, H, E), "key": (B, N, H, E), "value": (B, N, H, E)}
    inputs = {name: torch.randn(shape, generator=rng).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return Case(inputs, options)


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
    too_slow=lambda B, N, H, E: B * H * N > 1200,
    saves=lambda case: [case.inputs["query"][..., 0].numel()],  # lse
)

TestPooledAttention = shared_tests(OPERATOR)


def test_one_key_returns_its_value(backend: Backend):
    case = OPERATOR.case((3, 1, 2, 16), backend.device)
    found = OPERATOR.kernel(case)
    assert torch.equal(found["out"], case.inputs["value"][:, 0]) and found["d_value"].any()
    for name in ("d_query", "d_key"):  # the weight is 1 whatever the score is
        assert found[name].abs().max() < 1e-6
