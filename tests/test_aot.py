"""Every Triton kernel compiles to machine code for GPUs that are not here, without spills, on the matrix units.

The suite compiles the first call of every operator in bf16, which reaches every kernel; all calls, dtypes and widths
are for `python -m bench.aot --check` and `--widths`. `bench.counts --check` runs in the same process.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest

from bench import aot
from bench.launches import CALLS
from skipkernels.ops import launching

pytestmark = pytest.mark.skipif(not launching.installed, reason="Triton is not installed")


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Output of the functions of tests/ahead_of_time.py; one process imports torch and Triton for all."""
    folder = tmp_path_factory.mktemp("printed")
    names = ("kernels", "faults", "differences", "candidates", "counts_of_a_step")
    command = [sys.executable, "-m", "tests.ahead_of_time", str(folder), *names]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {name: (folder / name).read_text() for name in names}


@pytest.mark.slow
def test_kernels_are_sound_and_no_worse_than_the_table(printed):
    assert re.search(r"^[1-9]\d+ kernels, 0 problems$", printed["kernels"], re.MULTILINE), printed["kernels"]


@pytest.mark.slow
def test_counts_match_the_table(printed):
    assert re.search(r"^[1-9]\d* rows, 0 problems$", printed["counts_of_a_step"], re.MULTILINE), printed


@pytest.mark.slow
def test_faults_are_found_in_machine_code(printed):
    lines = printed["faults"].splitlines()
    assert lines[0] == "sound, sm_80: []" and lines[1] == "sound, gfx942: []"
    assert "has a tl.dot but uses no matrix instruction" in lines[2]
    assert "spills" in lines[3] and "spills" in lines[4]


@pytest.mark.slow
def test_what_is_compiled_is_what_a_launch_compiles(printed):
    (summary,) = printed["differences"].splitlines()
    assert int(summary.removesuffix(" compared")) >= 2 * len(CALLS)


@pytest.mark.slow
def test_candidates_of_tune_are_compiled(printed):
    lines = printed["candidates"].splitlines()
    assert lines and set(lines) == {"_class_at_kernel BLOCK_C=32 BLOCK_J=64 2"}


ROW = aot.Row(
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
    found = list(aot.problems_of(aot.Result(ROW._replace(**changes), (32,), has_dot=True)))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"registers": 81}, "registers 80 → 81"),
        ({"shared_bytes": 14337}, "shared_bytes 14336 → 14337"),
        ({"registers": 101, "triton": "3.7.0"}, "registers 80 → 101"),
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
