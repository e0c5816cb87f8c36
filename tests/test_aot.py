"""Every Triton kernel compiles to machine code for GPUs that are not here, without spills, on the matrix units.

The suite compiles the first call of every operator in bf16 for two targets; all calls, dtypes and widths are for
`python -m bench.aot --check` and `--widths`. `bench.counts --check` is here too: both compare with a table.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot, machine_code
from skipkernels.ops import launching

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not launching.installed, reason="Triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "checked"),
    [("aot --check --quick --target sm_90 gfx942", "kernels"), ("counts --check --classes 20", "rows")],
    ids=["aot", "counts"],
)
def test_no_worse_than_the_committed_table(command, checked):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", *f"bench.{command}".split()]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(rf"^[1-9]\d* {checked}, 0 problems$", done.stdout, re.MULTILINE), done


ROW = machine_code.Row(
    op="class_scores",
    shape="B4-C1000-D512",
    dtype="bf16",
    launch=1,
    kernel="_class_scores_kernel",
    target="gfx942",
    constants="BLOCK_C=32",
    programs=32,
    num_warps=4,
    num_stages=2,
    registers=80,
    spilled_bytes=0,
    shared_bytes=14336,
    matrix_instruction="v_mfma_f32_16x16x16_bf16",
    triton="3.6.0",
)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"shared_bytes": 64 * 1024 + 1}, "wants 65537 bytes of shared memory; a block may have 65536"),
        ({"spilled_bytes": 4}, "spills 4 bytes"),
        ({"matrix_instruction": ""}, "no matrix instruction"),
        ({"matrix_instruction": "", "spilled_bytes": 4, "target": "sm_75"}, None),  # Triton has none there
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_limits(changes, problem):
    found = list(machine_code.problems_of(ROW._replace(**changes), (32,), has_dot=True))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"registers": 81}, "registers 80 → 81"),
        ({"shared_bytes": 14337}, "shared_bytes 14336 → 14337"),
        ({"registers": 101, "shared_bytes": 28672, "triton": "3.7.0"}, None),
        ({"matrix_instruction": "v_mfma_f32_16x16x4_f32"}, "matrix instruction v_mfma_f32_16x16x16_bf16 → v_mfma_f32"),
        ({"launch": 2}, "is missing from aot.csv"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_compare_finds_larger_counts(changes, problem):
    found = list(aot.compare([ROW._replace(**changes)], [ROW]))
    assert (problem is None and not found) or problem in found[0]


def test_kernels_that_no_call_reaches_are_found(monkeypatch):
    importlib.import_module("skipkernels.ops.class_scores")
    assert "skipkernels.ops.class_scores._class_scores_kernel is reached by no call" in "\n".join(aot.not_reached([]))
    monkeypatch.setattr(aot, "CALLS", {})
    assert "class_scores has Triton kernels but no calls" in "\n".join(aot.not_reached([]))
