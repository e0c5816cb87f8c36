"""The tables of launch options, and the launches that follow from them."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import tune
from bench.launches import ARCHITECTURES, CALLS, WIDTHS, launches_of
from bench.machine_code import kernel_paths
from skipkernels.ops import launching
from skipkernels.ops.launching import Target, launch_options, table_of
from tests.ops import test_rotary_embedding as rotary
from tests.ops.backends import INTERPRETED, Backend
from tests.ops.test_step_shapes import CASES

A100 = Target("cuda", 80)
OPERATORS = {operator.name: operator for operator, *_ in CASES.values()} | {rotary.OPERATOR.name: rotary.OPERATOR}


def forget() -> None:
    for function in (launching.entry_of, launching.table_of, launching._target_of_gpu):
        function.cache_clear()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Tables as in a new process, also for later tests."""
    forget()
    yield
    forget()


@pytest.mark.parametrize("backend", [INTERPRETED], indirect=True)
@pytest.mark.parametrize("factor", [0.5, 2], ids=["half", "twice"])
@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_results_with_other_tables(backend: Backend, operator, factor):
    """A table may have any powers of two."""

    def another(*call: Any, **sizes: int) -> launching.Entry:
        entry = launching.entry_of(*call, **sizes)
        scaled = {name: max(1, int(value * factor)) for name, value in entry.options.items() if name != "MEASURE"}
        return entry._replace(options={**entry.options, **scaled})

    with launching.entries_from(another):
        operator.check_no_worse_than_eager(operator.case(operator.small, backend.device))


@pytest.mark.parametrize(
    ("working", "found"), [({torch.float32, None}, True), ({None}, False), (set(), None)], ids=["yes", "no", "error"]
)
def test_products_widen_unless_only_the_wide_product_fails(monkeypatch, working, found):
    """An error of the device is raised, and not remembered."""

    def product(*args: Any, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        if out_dtype not in working:
            raise RuntimeError("no such product")
        return torch.zeros(8, 8, dtype=out_dtype)

    monkeypatch.setattr(torch, "mm", product)
    expected = pytest.raises(RuntimeError, match="no such product") if found is None else contextlib.nullcontext()
    with expected:
        assert launching.products_widen.__wrapped__("cpu") is found


def test_defaults_have_every_kernel():
    assert {f"_{name}_kernel" for name in table_of(A100)} == set(kernel_paths().values())


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_every_entry_is_compiled_ahead_of_time(target):
    """By `bench.aot` and `bench.aot --widths`."""
    taken: set[tune.Place] = set()
    for calls_of in (CALLS, WIDTHS):
        for op, dtype in itertools.product(calls_of, (torch.float32, torch.bfloat16)):
            for call in calls_of[op](dtype):
                with tune.defaults_but({}) as of_call:
                    launches_of(op, call.arguments, ARCHITECTURES[target])
                taken |= of_call.keys()
    table = table_of(Target(*ARCHITECTURES[target][:2]))
    assert {tune.place_of(kernel, entry) for kernel, entries in table.items() for entry in entries} == taken


@pytest.mark.parametrize("path", sorted(launching.TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_tables_have_an_entry_for_every_size(path: Path):
    """And every option of the kernel."""
    defaults = launching.read_table(launching.TABLES / "defaults.json")
    for kernel, entries in launching.read_table(path).items():
        assert all(each.options.keys() == defaults[kernel][0].options.keys() for each in entries), kernel
        for itemsize in (2, 4):
            of_dtype = [each for each in entries if each.itemsize in (None, itemsize)]
            assert not of_dtype[-1].sizes, kernel
            largest = [tuple(each.sizes.values()) for each in of_dtype[:-1]]
            assert largest == sorted(set(largest)) and all(len(sizes) == 1 for sizes in largest), kernel


@pytest.mark.parametrize(("W", "rows"), [(1, 16), (64, 16), (65, 8), (768, 1), (10**6, 1)])
def test_nearest_size_that_is_not_smaller_counts(W, rows):
    assert launch_options("add_layer_norm_fwd", torch.empty(0), W=W)["BLOCK_R"] == rows


def test_without_a_gpu_the_defaults_count(monkeypatch):
    """The fakes of the meta device ask for the number of partial sums."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch_options("total", torch.empty(0, device="meta")) == {"BLOCK": 1024, "num_warps": 4}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tables."""
    for path in launching.TABLES.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(launching, "TABLES", tmp_path)
    return tmp_path


def test_a_device_may_have_its_own_table(tables: Path):
    (tables / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps({"total": [{"BLOCK": 512, "num_warps": 8}]}))
    with mock.patch.object(launching, "target", lambda of: Target("cuda", 90, "NVIDIA H100 80GB HBM3")):
        assert launch_options("total", torch.empty(0)) == {"BLOCK": 512, "num_warps": 8}
        assert launch_options("row_norms", torch.empty(0)) == {"num_warps": 1}
    with mock.patch.object(launching, "target", lambda of: Target("cuda", 90, "NVIDIA H200")):
        assert launch_options("total", torch.empty(0)) == {"BLOCK": 1024, "num_warps": 4}
