"""bench.counts: what is counted, and the comparison with the table; tests/test_aot.py compares the committed table."""

from __future__ import annotations

import pytest
import torch

from bench import counts
from skipkernels import functional
from skipkernels.ops import launching

pytestmark = pytest.mark.skipif(not launching.installed, reason="Triton is not installed")


def test_counts_of_calls_launches_and_flops():
    a, b = torch.randn(2, 3), torch.randn(3, 5)
    assert counts.counts_of(lambda: (a @ b).relu().T) == {
        "flops": 60, "calls": 2, "launches": 2, "triton": 0, "waits": 0
    }  # fmt: skip
    image, text = torch.randn(2, 8), torch.randn(3, 8)
    found = counts.counts_of(lambda: functional.class_scores(image, text, torch.tensor([0, 1])))
    assert (found["flops"], found["waits"]) == (96, 0)


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.equal(x), 1),
        (lambda x: x.index_put((x > 0,), torch.tensor(1.0)), 1),
        (lambda x: x[torch.tensor([0, 1])], 0),
        (lambda x: x.index_put((torch.tensor([0, 1]),), torch.tensor(1.0)), 0),
        (lambda x: x.sort().values.cumsum(0), 0),
    ],
    ids=["item", "nonzero", "mask", "equal", "put by mask", "index", "put", "sort"],
)
def test_counts_of_waits(wait, expected):
    x = torch.arange(-2.0, 3.0)
    assert counts.counts_of(lambda: wait(x))["waits"] == expected


# ---- the table -------------------------------------------------------------------------------------------------------

ROW = counts.Row(
    what=counts.STEP,
    model="vit-tiny",
    B=4,
    C=20,
    K=11,
    precision="bf16",
    memory="min",
    flops=1000,
    saved_bytes=2000,
    gradient_bytes=3000,
    calls=400,
    launches=500,
    triton=80,
    waits=2,
    torch="2.13",
)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"flops": 1001}, "flops 1,000 → 1,001"),
        ({"calls": 401}, "calls 400 → 401"),
        ({"waits": 3}, "waits 2 → 3"),
        ({"calls": 399}, "calls 400 → 399, better than in the table: run python -m bench.counts"),
        ({"calls": 420, "torch": "2.14"}, None),
        ({"calls": 421, "torch": "2.14"}, "calls 400 → 421"),
        ({"waits": 3, "torch": "2.14"}, "waits 2 → 3"),
        ({"K": 12}, "is missing from counts.csv"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_compare_finds_larger_counts(changes, problem):
    found = list(counts.compare([ROW._replace(**changes)], [ROW]))
    assert (problem is None and not found) or problem in found[0]
