"""The benchmarks: nothing wrong gets a time, and every case is one that the operators agree on."""

from __future__ import annotations

import importlib

import pytest
import torch

from bench import measure, run
from bench.operators import Case, with_gradients
from skipkernels.ops import OPERATORS

MODULES = [name.rstrip("_") for name in OPERATORS]


def doubling(factor: float, moved: int = 4096) -> Case:
    x = torch.linspace(1, 2, 1024, requires_grad=True)
    d_y = torch.ones(1024)
    return Case(
        shape="N1024",
        runs={
            "skipkernels": with_gradients(lambda: [x * factor], [x], [d_y]),
            "eager": with_gradients(lambda: [x + x], [x], [d_y]),
        },
        truth=with_gradients(lambda: [x.double() * 2], [x], [d_y.double()]),
        moved=moved,
        absent={"peer": "needs a GPU"},
        target="≥ 1",
    )


def test_a_wrong_result_gets_no_time():
    rows = {row["who"]: row for row in run.rows_of(doubling(2.001), 0.01)}
    assert rows["skipkernels"]["p50_ms"] == "" and "wrong: result 0 is off by 5.0e-04" in rows["skipkernels"]["wanted"]
    assert float(rows["eager"]["p50_ms"]) > 0 and rows["eager"]["faster"] == ""


def test_a_right_result_gets_times_a_ratio_and_memory():
    rows = {row["who"]: row for row in run.rows_of(doubling(2.0), 0.01)}
    ours, eager, peer = rows["skipkernels"], rows["eager"], rows["peer"]
    assert float(ours["p20_ms"]) <= float(ours["p50_ms"]) <= float(ours["p80_ms"])
    assert float(eager["faster"]) > 0 and eager["wanted"] == "≥ 1" and ours["faster"] == ""
    assert 0 < float(ours["of_copy"]) and float(ours["peak_mib"]) >= 0
    assert peer["wanted"] == "needs a GPU" and peer["p50_ms"] == ""


def test_peak_bytes_counts_what_is_allocated_in_between():
    assert measure.peak_bytes(lambda: torch.zeros(50 << 20, dtype=torch.uint8).sum()) >= 45 << 20
    assert measure.peak_bytes(lambda: None) < 5 << 20


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_operator_has_a_case_with_a_right_result(name, dtype):
    case = next(iter(importlib.import_module(f"bench.operators.{name}").cases(dtype)))
    assert {"skipkernels", "eager"} <= set(case.runs) and case.moved > 0
    assert run.error_of(case, "skipkernels") == ""
