"""Every Triton kernel compiles to machine code for GPUs that are not here, without spills, on the matrix units.

The suite compiles the first call of every operator in bf16, which reaches every kernel; all calls and dtypes, with
every entry of the block tables, are for `python -m bench.aot --check`.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from bench import aot
from bench.launches import CALLS
from skipkernels.ops import launching

pytestmark = pytest.mark.skipif(not launching.installed, reason="Triton is not installed")


FIRST_CALL = ("class_scores", "B4-C1000-D512", "sm_80", "bf16")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a process that compiles kernels and does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_kernels_are_sound_and_no_worse_than_the_table():
    done = python("-m", "bench.aot", "--check", "--quick", "--target", "sm_90", "gfx942", "--dtype", "bf16")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_fails_where_the_table_says_less(tmp_path, monkeypatch):
    rows = [row for row in aot.read_table() if row.triton == launching.triton.__version__]
    if not rows:
        pytest.skip("the table was made by another Triton, and what its kernels need may grow a little")
    monkeypatch.setattr(aot, "TABLE", tmp_path / "aot.csv")
    less = [row._replace(registers=row.registers - 1, shared_bytes=row.shared_bytes - 1) for row in rows]
    aot.write_table(less)
    arguments = ["--check", "--quick", "--op", "class_scores", "--target", "sm_80", "--dtype", "bf16"]
    code = f"from pathlib import Path; from bench import aot; aot.TABLE = Path({str(aot.TABLE)!r}); aot.main()"
    done = python("-c", code, *arguments)
    (before,) = [row for row in less if (row.op, row.shape, row.target, row.dtype) == FIRST_CALL]
    assert done.returncode == 1, done.stderr
    for what in ("registers", "shared_bytes"):
        number = getattr(before, what)
        assert f"{before.name}: {what} {number} → {number + 1}" in done.stdout


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Output of the functions of tests/ahead_of_time.py; one process imports torch and Triton for all."""
    folder = tmp_path_factory.mktemp("printed")
    names = ("faults", "differences", "sweep", "warmup", "paths")
    done = python("-m", "tests.ahead_of_time", str(folder), *names)
    assert done.returncode == 0, done.stderr
    return {name: (folder / name).read_text() for name in names}


def test_faults_are_found_in_machine_code(printed):
    lines = printed["faults"].splitlines()
    assert lines[0] == "sound, sm_80: []" and lines[1] == "sound, gfx942: []"
    assert "has a tl.dot but uses no matrix instruction" in lines[2]
    assert "spills" in lines[3] and "spills" in lines[4]


def test_what_is_compiled_is_what_a_launch_compiles(printed):
    (summary,) = printed["differences"].splitlines()
    assert int(summary.removesuffix(" compared")) >= 4 * len(CALLS)


def test_the_sweep_finds_arguments_that_do_not_compile(printed):
    assert printed["sweep"].startswith("(3, ['length_kernel does not compile with N = 1: ")
    assert printed["sweep"].count("does not compile") == 1


def test_warmup_fills_the_cache(printed):
    assert printed["warmup"] == "['']\n['cached']\n['_class_scores_kernel.cubin']\n"


def test_machine_code_is_the_same_in_every_folder(printed):
    assert printed["paths"] == "[False, True]\n"


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
        ({"shared_bytes": 64 * 1024}, None),
        ({"shared_bytes": 64 * 1024 + 1}, "wants 65537 bytes of shared memory; a block may have 65536"),
        ({"shared_bytes": 64 * 1024 + 1, "target": "sm_80"}, None),
        ({"spilled_bytes": 4}, "spills 4 bytes"),
        ({"matrix_instruction": ""}, "no matrix instruction"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_limits(changes, problem):
    found = list(aot.problems_of(aot.Result(ROW._replace(**changes), (32,), has_dot=True)))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_grids_that_no_gpu_takes_are_found():
    assert not list(aot.problems_of(aot.Result(ROW, (2**31 - 1, 65535), has_dot=True)))
    assert "grid" in next(aot.problems_of(aot.Result(ROW, (1, 65536), has_dot=True)))


def test_kernels_without_a_dot_need_no_matrix_units():
    assert not list(aot.problems_of(aot.Result(ROW._replace(matrix_instruction=""), (32,), has_dot=False)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"registers": 79}, None),
        ({"registers": 81}, "registers 80 → 81"),
        ({"shared_bytes": 14337}, "shared_bytes 14336 → 14337"),
        ({"registers": 100, "triton": "3.7.0"}, None),
        ({"registers": 101, "triton": "3.7.0"}, "registers 80 → 101"),
        ({"matrix_instruction": "v_mfma_f32_16x16x4_f32"}, "matrix instruction v_mfma_f32_16x16x16_bf16 → v_mfma_f32"),
        ({"matrix_instruction": "v_mfma_f32_16x16x4_f32", "triton": "3.7.0"}, None),
        ({"launch": 2}, "is missing from aot.csv"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_compare_finds_larger_counts(changes, problem):
    found = list(aot.compare([ROW._replace(**changes)], [ROW]))
    assert (problem is None and not found) or problem in found[0]


def test_compare_finds_a_stale_row():
    assert "nothing compiles it" in next(aot.compare([], [ROW]))


def test_kernels_that_no_call_reaches_are_found(monkeypatch):
    importlib.import_module("skipkernels.ops.class_scores")
    assert "skipkernels.ops.class_scores._class_scores_kernel is reached by no call" in "\n".join(aot.not_reached([]))
    monkeypatch.setattr(aot, "CALLS", {})
    assert "class_scores has Triton kernels but no calls" in "\n".join(aot.not_reached([]))


def test_table_round_trip(tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "TABLE", tmp_path / "aot.csv")
    assert aot.read_table() == []
    aot.write_table([ROW])
    assert aot.read_table() == [ROW]
