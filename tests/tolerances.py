"""Every slack of the numerical tests, with its reason.

The rule is err(kernel) ≤ err(eager) + SLACK[dtype], errors as `relative_error` against the same function in fp64, where
eager is what a user would write in the dtype. The slack is there because eager's error may be zero by luck.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = {
    # A few roundings in another order than eager's: a sum of D products in blocks, then the unit norm.
    torch.float64: 1e-14,
    # 16 steps of 2⁻²³: the order of the sums over D and K differs.
    torch.float32: 2e-6,
    # The result is rounded once: half a step of bf16 (2⁻⁹). Sums are fp32, eager's are not.
    torch.bfloat16: 2e-3,
    # Half a step of fp16 (2⁻¹²), the same way.
    torch.float16: 2.5e-4,
}

# A cosine in fp32 is known to about 1e-7, a logit to logit_scale times that, and so is the logarithm of a probability.
COSINE = {torch.float64: 1e-15, torch.float32: 1.2e-7, torch.bfloat16: 1.2e-7, torch.float16: 1.2e-7}


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value − truth| / |truth| over all elements; where the truth is 0 the value has to be as well."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    assert torch.equal(value.isfinite(), truth.isfinite())
    finite = truth.isfinite()
    difference, size = (value - truth)[finite].norm(), truth[finite].norm()
    return float(difference / size) if size > 0 else float(difference)
