"""bench.roofline: the arithmetic, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from bench import roofline


def test_floor_is_the_larger_of_memory_and_products():
    A100 = roofline.GPUS["A100"]
    assert roofline.floor(2_039_000, 0, "bf16", A100) == (pytest.approx(1.0), "memory")
    assert roofline.floor(2_039_000, 312_000_000, "bf16", A100).bound == "memory"
    assert roofline.floor(2_039_000, 624_000_000, "bf16", A100) == (pytest.approx(2.0), "products")
    # Three products in tf32 for one in fp32.
    assert roofline.floor(2_039_000, 104_000_000, "fp32", A100) == (pytest.approx(2.0), "products")
