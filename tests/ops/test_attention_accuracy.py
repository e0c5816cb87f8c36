"""The C++ attention kernels against fp64 and eager where fp32 scores are inexact."""

from __future__ import annotations

import statistics

import pytest
import torch

from skipkernels.testing import relative_error
from tests.ops import test_pooled_attention as pooled
from tests.ops import test_suffix_attention as suffix

DRAWS = 45
# Error over eager's error, median of the draws. 1.1: the spread of such a median between equal methods.
RATIO = 1.1
CASES = {
    "suffix-K50-S3-P4-H2-E64": (suffix, (50, 3, 4, 2, 64)),
    "pooled-B100-N7-H2-E64": (pooled, (100, 7, 2, 64)),
    "pooled-B30-N50-H2-E16": (pooled, (30, 50, 2, 16)),
}


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@pytest.mark.parametrize("deviation", [10, 30, 100, 300])
@pytest.mark.parametrize("name", CASES)
def test_inexact_scores_no_worse_than_eager(backend, name, deviation):
    module, shape = CASES[name]
    names = ("out", *module.NAMES)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(DRAWS):
        case = module.make(*shape, seed=seed, device=backend.device)
        case.inputs[0].data.mul_(deviation)
        exact = module.result_and_gradients(module.truth, case.to(torch.float64))
        values = module.result_and_gradients(module.kernel, case)
        others = module.result_and_gradients(module.eager, case)
        for name, value, other, right in zip(names, values, others, exact, strict=True):
            ratios[name].append(relative_error(value, right) / max(relative_error(other, right), 1e-9))
    medians = {name: round(statistics.median(draws), 2) for name, draws in ratios.items()}
    assert max(medians.values()) <= RATIO, medians
