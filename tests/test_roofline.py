"""The arithmetic of the roofline, against numbers worked out by hand."""

from __future__ import annotations

import importlib

import pytest
import torch

from bench import aot, roofline
from bench.launches import CALLS
from bench.targets import ARCHITECTURES, GPUS, KIB


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 4, (16, 64, 1.0, "registers")),  # 64 warps of 1,024 registers: all there is of both
        ("sm_80", 64, 0, 4, (8, 32, 0.5, "registers")),  # 32 warps of 2,048
        ("sm_80", 65, 0, 4, (7, 28, 0.4375, "registers")),  # 72 registers are given; 7 warps in each quarter
        ("sm_80", 255, 0, 8, (1, 8, 0.125, "registers")),
        ("sm_80", 32, 48 * KIB, 4, (3, 12, 0.1875, "shared memory")),  # 3 × (48 + 1) ≤ 164
        ("sm_80", 32, 163 * KIB, 4, (1, 4, 0.0625, "shared memory")),
        ("sm_90", 32, 113 * KIB, 4, (2, 8, 0.125, "shared memory")),  # 2 × (113 + 1) = 228
        ("sm_90", 16, 0, 1, (32, 32, 0.5, "blocks")),
        ("sm_100", 16, 0, 16, (4, 64, 1.0, "warps")),
        ("gfx942", 128, 0, 4, (4, 16, 0.5, "registers")),  # 512 / 128 in each of four SIMDs
        ("gfx942", 64, 33 * KIB, 4, (1, 4, 0.125, "shared memory")),
    ],
)
def test_occupancy(target, registers, shared, warps, expected):
    assert roofline.occupancy(registers, shared, warps, ARCHITECTURES[target]) == expected


def test_floor_is_the_larger_of_memory_and_products():
    A100 = GPUS["A100"]
    assert roofline.floor(2_039_000, 0, "bf16", A100) == (pytest.approx(1.0), "memory")
    assert roofline.floor(2_039_000, 312_000_000, "bf16", A100).bound == "memory"
    assert roofline.floor(2_039_000, 624_000_000, "bf16", A100) == (pytest.approx(2.0), "products")
    # Three products in tf32 for one in fp32.
    assert roofline.floor(2_039_000, 104_000_000, "fp32", A100) == (pytest.approx(2.0), "products")


@pytest.mark.parametrize("op", roofline.WORK)
def test_work_is_that_of_the_microbenchmarks(op):
    """Both state the least that must be moved and multiplied; on the shapes that both have they agree."""
    try:
        cases = importlib.import_module(f"bench.operators.{op.rstrip('_')}").cases
    except ModuleNotFoundError:
        pytest.skip("no microbenchmark")
    found = {(row["op"], row["shape"], row["dtype"]): row for row in roofline.floors()}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for case in cases(dtype):
            row = found.get((op, case.shape, name))
            if row is not None:
                assert (row["bytes"], row["flops"]) == (case.moved, case.flops), case.shape


def test_views_and_allocations_are_no_launches():
    x = torch.ones(4, 6)

    def several():
        y = x.view(6, 4).T[1:].expand(3, 6).detach()
        torch.empty(3), torch.empty_like(y), x.new_empty(2), y.unsqueeze(0)
        return y

    assert roofline.count(several).torch == 0
    assert roofline.count(lambda: torch.zeros(3)).torch == 1
    assert roofline.count(lambda: x.T.contiguous() + 1).torch == 2


def test_launches_of_class_scores():
    call = next(CALLS["class_scores"](torch.float32))
    assert roofline.launches_of("class_scores", call.arguments) == 1
    image, prototypes, labels = (torch.zeros(x.shape, dtype=x.dtype) for x in call.arguments)
    # Norm, its lower bound, quotient, product, maximum, true classes.
    assert roofline.eager_launches("class_scores", (image, prototypes, labels)) == 6


def test_backward_is_counted():
    x = torch.randn(2, 3)
    # Sum, layer norm, its backward, the sum of both gradients of hidden; both summands get that.
    assert roofline.eager_launches("add_layer_norm", (x, x, torch.ones(3), torch.zeros(3))) == 4


def test_every_operator_is_counted():
    rows = {row["what"]: row for row in roofline.launches_by_operator()}
    assert rows.keys() == {aot.family(op) for op in CALLS}
    assert all(row["plain_pytorch"] >= 1 and row["ours"] >= 1 for row in rows.values())


def test_the_fewest_warps_are_shown():
    row = dict(op="a", kernel="k", target="sm_80", dtype="bf16")
    assert roofline.worst([row | {"warps": 8}, row | {"warps": 4}, row | {"warps": 6}]) == [row | {"warps": 4}]


def test_occupancy_of_every_line_of_the_table():
    rows = list(roofline.occupancies(aot.read_table()))
    assert rows and all(row["blocks"] >= 1 for row in rows)
