"""Both attention operators with any scale, and with scores of any size."""

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import Backend
from tests.ops.harness import Case, Operator
from tests.ops.test_pooled_attention import OPERATOR as pooled
from tests.ops.test_shared_prefix_attention import OPERATOR as shared

each_operator = pytest.mark.parametrize(
    ("operator", "shape"),
    [(pooled, (24, 12, 2, 16)), (shared, (30, 5, 6, 2, 16))],
    ids=lambda x: x.name if isinstance(x, Operator) else "",
)


def queries_and_keys(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    if "packed" in case.inputs:
        return case.inputs["packed"].data.chunk(3, dim=1)[:2]
    return case.inputs["query"].data, case.inputs["key"].data


@pytest.mark.parametrize("operator", [pooled, shared], ids=lambda operator: operator.name)
@pytest.mark.parametrize("scale", [0.0, -0.3, 4.0])
def test_any_scale(backend: Backend, operator, scale):
    operator.check_no_worse_than_eager(operator.case(operator.small, backend.device, scale=scale))


@each_operator
@pytest.mark.parametrize("deviation", [10, 300])
def test_no_worse_than_eager_at_any_deviation_of_scores(backend: Backend, operator, shape, deviation):
    """Queries and keys are multiples of 1/8, so that scores are exact; errors are those of softmax and its gradient."""
    case = operator.case(shape, backend.device)
    for part, factor in zip(queries_and_keys(case), (deviation, 1), strict=True):
        part.mul_(8 * factor).round_().div_(8)
    for dtype in {torch.float32, torch.bfloat16} & set(backend.dtypes):
        operator.check_no_worse_than_eager(case.to(dtype))


@each_operator
def test_large_products_neither_overflow_nor_underflow(backend: Backend, operator, shape):
    case = operator.case(shape, backend.device)
    queries_and_keys(case)[0].mul_(1000)
    found = operator.kernel(case)
    for name, right in operator.truth(case).items():
        # Products of 10⁴ have errors of 10⁻³; gradients vanish if one key has all the weight.
        assert (found[name] - right).abs().max() < 1e-3 * max(1.0, right.abs().max().item()), name
