"""column_sums of matrices of several widths and dtypes."""

from __future__ import annotations

import pytest
import torch

from skipkernels.ops.row_sums import column_sums
from skipkernels.testing import SLACK
from tests.ops.backends import Backend

SHAPES = [(1, 1), (129, 33), (3, 64), (130, 7), (788, 70)]


def rows(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 7])
def test_column_sums_equal_fp64(backend: Backend, count, dtype):
    """Matrices of two dtypes, or in fp64 of one; the first has strided rows."""
    backend.skip_unless_supported(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    strided = rows(9, 5, 40, device=backend.device, dtype=wide)[:, 3:20]
    others = [rows(i, *SHAPES[i % len(SHAPES)], device=backend.device, dtype=dtype) for i in range(1, count)]
    matrices = [strided, *others]
    found = column_sums(matrices, torch.float32)
    exact = torch.cat([x.double().sum(dim=0) for x in matrices])
    size = torch.cat([x.double().abs().sum(dim=0) for x in matrices])
    assert found.dtype == torch.float32 and ((found.double() - exact).abs() <= SLACK[torch.float32] * size).all()


def test_column_sums_are_rounded_once(backend: Backend):
    x = rows(0, 300, 50, device=backend.device)
    assert torch.equal(column_sums([x], torch.float16), column_sums([x], torch.float32).half())


def test_column_sums_opcheck(backend: Backend):
    matrices = [rows(i, 5, 8, device=backend.device) for i in range(3)]
    backend.opcheck(column_sums, (matrices, torch.float16))
