"""Digests of tensors, on the CPU and by the operations that a device runs."""

from __future__ import annotations

import pytest
import torch

from skipkernels.digests import _device_digest, digests


@pytest.mark.parametrize(
    "function", [lambda x: digests([x])[0], lambda x: _device_digest(x).item()], ids=["cpu", "gpu"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_digests_depend_on_signs_and_positions(function, dtype):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    others = [x.clone(), -x, x.flip(0), x.roll(1), x.T.reshape(6, 5)]
    others[0][2, 3] = -others[0][2, 3]
    assert len({function(other) for other in [x, *others]}) == 6
    assert function(x) == function(x.clone())
