"""Both attention operators with any scale, and with scores of any size."""

from __future__ import annotations

import statistics

import pytest
import torch

from skipkernels.testing import relative_error
from tests.ops.backends import GPU, INTERPRETED, Backend
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


# ---- inexact scores --------------------------------------------------------------------------------------------------

# Error over eager's error, median of the draws. 1.1: the spread of such a median between equal methods.
RATIO = 1.1
DRAWS = 25
CASES = {
    "shared-K20-S3-P4-H2-E64": (shared, (20, 3, 4, 2, 64)),
    "pooled-B100-N7-H2-E64": (pooled, (100, 7, 2, 64)),
}
# Of the other backends only gradients: the result of a matrix product of NumPy (the interpreter) and of a matrix-vector
# product of MKL (the fallback) has up to 1.3 times the error of the small matrix products of eager.
FEW_DRAWS = 8  # the interpreter takes a second for each
FEW_CASES = {
    "shared-K8-S3-P5-H1-E64": (shared, (8, 3, 5, 1, 64)),
    "pooled-B16-N7-H1-E64": (pooled, (16, 7, 1, 64)),
}


def check_median_ratios(backend: Backend, operator: Operator, shape, deviation, draws, only_gradients=False) -> None:
    ratios: dict[str, list[float]] = {}
    for seed in range(draws):
        case = operator.case(shape, backend.device, seed=seed)
        queries_and_keys(case)[0].mul_(deviation)
        functions = operator.function, operator.eager
        ours, theirs = (operator.parts(case, operator.run(function, case)) for function in functions)
        for name, right in operator.parts(case, operator.truth(case)).items():
            if name != "out" or not only_gradients:
                error, bound = (relative_error(x[name], right) for x in (ours, theirs))
                ratios.setdefault(name, []).append(error / max(bound, 1e-9))
    medians = {name: round(statistics.median(drawn), 2) for name, drawn in ratios.items()}
    assert max(medians.values()) <= RATIO, medians


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("deviation", [30, 300])
@pytest.mark.parametrize("name", CASES)
def test_inexact_scores_no_worse_than_eager(backend: Backend, name, deviation):
    check_median_ratios(backend, *CASES[name], deviation, DRAWS)


OTHERS = ["reference", INTERPRETED, GPU]


@pytest.mark.parametrize("backend", OTHERS, indirect=True)
@pytest.mark.parametrize("deviation", [300])
@pytest.mark.parametrize("name", FEW_CASES)
def test_gradients_of_inexact_scores_no_worse_than_eager(backend: Backend, name, deviation):
    check_median_ratios(backend, *FEW_CASES[name], deviation, FEW_DRAWS, only_gradients=True)
