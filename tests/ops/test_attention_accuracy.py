"""The attention operators against fp64 and eager where fp32 scores are inexact."""

from __future__ import annotations

import statistics

import pytest
import torch

from skipkernels.testing import relative_error
from tests.ops import test_pooled_attention as pooled
from tests.ops import test_shared_prefix_attention as shared

# Error over eager's error, median of the draws. 1.1: the spread of such a median between equal methods.
RATIO = 1.1
DRAWS = 45
CASES = {
    "shared-K50-S3-P4-H2-E64": (shared, (50, 3, 4, 2, 64)),
    "pooled-B100-N7-H2-E64": (pooled, (100, 7, 2, 64)),
    "pooled-B30-N50-H2-E16": (pooled, (30, 50, 2, 16)),
}
# Of the other backends only gradients: the result of a matrix product of NumPy (the interpreter) and of a matrix-vector
# product of MKL (the fallback) has up to 1.3 times the error of the small matrix products of eager.
FEW_DRAWS = 12  # the interpreter takes a second for each
FEW_CASES = {
    "shared-K8-S3-P5-H1-E64": (shared, (8, 3, 5, 1, 64)),
    "pooled-B16-N7-H1-E64": (pooled, (16, 7, 1, 64)),
}


def check_median_ratios(backend, module, shape, deviation, names, draws) -> None:
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(draws):
        case = module.make(*shape, seed=seed, device=backend.device)
        query = case.inputs[0].data if module is pooled else case.inputs[0].data[:, : case.width]
        query.mul_(deviation)
        exact = module.result_and_gradients(module.truth, case.to(torch.float64))
        values = module.result_and_gradients(module.kernel, case)
        others = module.result_and_gradients(module.eager, case)
        for name, value, other, right in zip(("out", *module.NAMES), values, others, exact, strict=True):
            if name in names:
                error, bound = (relative_error(x.cpu(), right.cpu()) for x in (value, other))
                ratios[name].append(error / max(bound, 1e-9))
    medians = {name: round(statistics.median(drawn), 2) for name, drawn in ratios.items()}
    assert max(medians.values()) <= RATIO, medians


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("deviation", [30, 300])
@pytest.mark.parametrize("name", CASES)
def test_inexact_scores_no_worse_than_eager(backend, name, deviation):
    module, shape = CASES[name]
    check_median_ratios(backend, module, shape, deviation, ("out", *module.NAMES), DRAWS)


@pytest.mark.parametrize("deviation", [30, 300])
@pytest.mark.parametrize("name", FEW_CASES)
def test_gradients_of_inexact_scores_no_worse_than_eager(backend, name, deviation):
    module, shape = FEW_CASES[name]
    check_median_ratios(backend, module, shape, deviation, module.NAMES, FEW_DRAWS)
