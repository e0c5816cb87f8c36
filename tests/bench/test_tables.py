"""Tables without times, of docs/gpu.md: machine code of kernels (aot.csv), operations of a step (counts.csv).

The suite compiles the first call of every operator in bf16 for two targets, and counts steps with 20 classes. All of
both is for `python -m bench.aot --check` and `--widths`, and for `python -m bench.counts --check`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import aot, counts, machine_code
from skipkernels import functional
from skipkernels.ops import launching

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not launching.installed, reason="Triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "checked"),
    [("aot --check --quick --target sm_90 gfx942", "kernels"), ("counts --check --classes 20", "rows")],
    ids=["aot", "counts"],
)
def test_committed_table_is_up_to_date(command, checked):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", *f"bench.{command}".split()]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(rf"^[1-9]\d* {checked}, 0 problems$", done.stdout, re.MULTILINE), done


KERNEL = machine_code.Row(
    op="class_scores", shape="B4-C1000-D512", dtype="bf16", launch=1, kernel="_class_scores_kernel", target="gfx942",
    constants="BLOCK_C=32", programs=32, num_warps=4, num_stages=2, registers=80, spilled_bytes=0, shared_bytes=14336,
    matrix_instruction="v_mfma_f32_16x16x16_bf16", triton="3.6.0",
)  # fmt: skip
STEP = counts.Row(
    what=counts.STEP, model="vit-tiny", B=4, C=20, K=11, precision="bf16", memory="min", flops=1000, saved_bytes=2000,
    gradient_bytes=3000, calls=400, launches=500, triton=80, waits=2, torch="2.13",
)  # fmt: skip
# A row of a table, what changes in a new one, and the problem, if it is one.
COMPARED = [
    (KERNEL, {}, ""),
    (KERNEL, {"registers": 81}, "registers 80 → 81"),
    (KERNEL, {"shared_bytes": 14337}, "shared_bytes 14336 → 14337"),
    (KERNEL, {"registers": 101, "shared_bytes": 28672, "triton": "3.7.0"}, ""),
    (KERNEL, {"matrix_instruction": "v_mfma_f32_16x16x4_f32"}, "v_mfma_f32_16x16x16_bf16 → v_mfma_f32_16x16x4"),
    (KERNEL, {"launch": 2}, "is missing from aot.csv"),
    (STEP, {}, ""),
    (STEP, {"flops": 1001}, "flops 1,000 → 1,001"),
    (STEP, {"calls": 401}, "calls 400 → 401"),
    (STEP, {"waits": 3}, "waits 2 → 3"),
    (STEP, {"calls": 399}, "calls 400 → 399, better than in the table: run python -m bench.counts"),
    (STEP, {"calls": 420, "torch": "2.14"}, ""),
    (STEP, {"calls": 421, "torch": "2.14"}, "calls 400 → 421"),
    (STEP, {"waits": 3, "torch": "2.14"}, "waits 2 → 3"),
    (STEP, {"K": 12}, "is missing from counts.csv"),
]


@pytest.mark.parametrize(("row", "changes", "problem"), COMPARED, ids=[problem or "none" for *_, problem in COMPARED])
def test_compare_finds_other_counts(row, changes, problem):
    compare = aot.compare if row is KERNEL else counts.compare
    found = "\n".join(compare([row._replace(**changes)], [row]))
    assert problem in found and bool(problem) == bool(found)


# ---- machine code ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"shared_bytes": 64 * 1024 + 1}, "wants 65537 bytes of shared memory; a block may have 65536"),
        ({"spilled_bytes": 4}, "spills 4 bytes"),
        ({"matrix_instruction": ""}, "no matrix instruction"),
        ({"matrix_instruction": "", "spilled_bytes": 4, "target": "sm_75"}, ""),  # Triton has none there
    ],
)
def test_limits_of_a_kernel(changes, problem):
    found = list(machine_code.problems_of(KERNEL._replace(**changes), (32,), has_dot=True))
    assert len(found) == bool(problem) and problem in "".join(found)


@pytest.mark.parametrize(("target", "missing"), [("sm_75", False), ("sm_90", True)])
def test_kernels_that_no_call_reaches_are_problems_of_targets_in_the_table(monkeypatch, capsys, target, missing):
    """Others have the first calls alone."""
    monkeypatch.setattr(aot.launching.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(aot, "jobs_of", lambda *_: iter(()))
    monkeypatch.setattr(aot, "compile_all", lambda jobs: [])
    monkeypatch.setattr(sys, "argv", ["aot", "--target", target])
    with contextlib.suppress(SystemExit):
        aot.main()
    assert ("is reached by no call" in capsys.readouterr().out) == missing


def test_kernels_that_no_call_reaches_are_found(monkeypatch):
    importlib.import_module("skipkernels.ops.class_scores")
    assert "skipkernels.ops.class_scores._class_scores_kernel is reached by no call" in "\n".join(aot.not_reached([]))
    monkeypatch.setattr(aot, "CALLS", {})
    assert "class_scores has Triton kernels but no calls" in "\n".join(aot.not_reached([]))


# ---- operations ------------------------------------------------------------------------------------------------------


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
