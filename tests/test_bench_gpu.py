"""bench/gpu.sh: its stages and its summary."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.autograd import DeviceType

from bench import gpu, inputs, measure, summary, training
from skipkernels import testing
from skipkernels.graphs import graphed_step
from tests.conftest import TELLING, place

CUT = "--model vit-tiny --classes 20 --skip-layers 3 --device cpu --rounds 1 --no-save".split()
SCRIPT = Path(gpu.__file__).with_name("gpu.sh")
TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def limits(monkeypatch) -> None:
    """Fixed limits of the machine, and no slow measurement of memory."""
    monkeypatch.setattr(testing, "peak_bytes", lambda function, device, **_: 0)
    monkeypatch.setattr(measure, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(measure, "bandwidth", lambda device: 1e10)


# ---- the stages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, printed",
    [
        ("profile_step", "skipkernels::"),
        ("one_step", "loss: "),
        ("smoke", "class_scores: "),
    ],
)
def test_stages_run_on_the_cpu(stage, printed, capsys):
    gpu.main([stage, *CUT])
    assert printed in capsys.readouterr().out


def test_script_runs_each_stage_with_its_limit(tmp_path):
    """With `echo` in place of Python; one that cannot run does not stop the others."""
    environment = os.environ | {"PYTHON": "echo", "OUT": str(tmp_path)}
    done = subprocess.run([SCRIPT, "step", "racecheck", "ncu"], capture_output=True, text=True, env=environment)
    assert [line.partition(",")[0] for line in done.stdout.splitlines()] == [
        "step: exit status 0", "racecheck: exit status 127", "ncu: exit status 127"
    ]  # fmt: skip
    assert (tmp_path / "step.txt").read_text() == f"-m bench.gpu step --out {tmp_path}\n"


def test_limits_of_the_stages_are_ten_minutes():
    lines = [line.split() for line in SCRIPT.read_text().splitlines() if line.startswith("stage ")]
    assert len(lines) == 9 and sum(int(line[2]) for line in lines) <= 600


def test_profiler_sees_one_warm_step(monkeypatch):
    """The steps before it, and the construction, are not between the two calls."""
    events, run = [], graphed_step.GraphedStep.__call__

    @contextlib.contextmanager
    def profiled(device: torch.device) -> Iterator[None]:
        events.append("start")
        yield
        events.append("stop")

    def counted(self, *batch):
        events.append("step")
        return run(self, *batch)

    monkeypatch.setattr(graphed_step.GraphedStep, "__call__", counted)
    monkeypatch.setattr(gpu, "profiled", profiled)
    gpu.main(["one_step", *CUT])
    assert events == ["step", "step", "start", "step", "stop"]


def test_telling_tests_come_first_on_a_gpu():
    ids = ["a.py::test_x", "ops/test_b.py::TestB::test_no_worse_than_eager[gpu]", "test_replays_on_a_gpu.py::test_x"]
    items = [*map(Named, ids), Named("ops/test_step_shapes.py::test_no_worse_than_eager[gpu]")]
    assert sorted(items, key=lambda item: place(item, True)) == items[::-1]
    files = {path.name for path in TESTS.rglob("test_*.py")}
    assert all(part in files or part.removeprefix("::") in (TESTS / "ops/harness.py").read_text() for part in TELLING)


class Named(NamedTuple):
    nodeid: str


def test_step_writes_its_facts_on_a_gpu(monkeypatch, tmp_path):
    """The CPU in place of a GPU: every path but the capture and the counting of launches."""
    on_cpu = functools.partial(inputs.random_inputs, "vit-tiny", 4, 20, measure.CPU)
    machine = measure.machine(measure.CPU)
    monkeypatch.setattr(gpu, "_random_inputs", lambda *_: on_cpu())
    monkeypatch.setattr(gpu, "launches_of", lambda run, device: {"kernels": 1, "copies": 2})
    monkeypatch.setattr(measure, "machine", lambda device: machine)
    monkeypatch.setattr(training.Published, "compiled", training.Published.step)
    monkeypatch.setattr(measure, "seconds_of", lambda function, device, calls=1, before=None: 0.001 * calls)
    gpu.main(["step", *CUT, "--device", "cuda", "--out", str(tmp_path)])
    found = summary.read_facts(tmp_path)["step bf16"]
    theirs = {summary.PUBLISHED, summary.COMPILED}
    assert found["ms"].keys() == {summary.EAGER, summary.GRAPHED} | theirs and found["faster"].keys() == theirs
    assert set(found["ms"].values()) == {10.0} and found["difference"] == 0
    assert (found["captured"], found["launches"]) == (False, {"kernels": 1, "copies": 2})


def test_replays_are_compared_in_bits(monkeypatch):
    """Without a GPU both steps are eager; the test of the facts of a step has equal ones."""
    args = argparse.Namespace(
        model="vit-tiny", batch=4, classes=20, device=measure.CPU, skip_layers=3, precision="bf16"
    )
    made, made_as = [], gpu.graphed_step

    def another(*arguments, **options):
        run, step = made_as(*arguments, **options)
        made.append(step._clip.model.visual.proj)
        if len(made) == 1:
            made[0].data[0, 0] += 1e-7
        return run, step

    monkeypatch.setattr(gpu, "graphed_step", another)
    assert 0 < gpu.difference_of_replays(args) < 1e-5


def test_launches_are_kernels_and_copies(monkeypatch):
    names = {"_a_kernel": "CUDA", "Memcpy DtoD (Device -> Device)": "CUDA", "void b<float>": "CUDA", "aten::mm": "CPU"}
    events = [types.SimpleNamespace(name=name, device_type=getattr(DeviceType, of)) for name, of in names.items()]
    profiler = types.SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(gpu, "profile", lambda activities: contextlib.nullcontext(profiler))
    assert gpu.launches_of(lambda: None, measure.CPU) == {"kernels": 2, "copies": 1}


# ---- the summary -----------------------------------------------------------------------------------------------------

STEP = {
    "captured": True,
    "difference": 0.0,
    "launches": {"kernels": 357, "copies": 33},
    "B": 4,
    "ms": {"published": 9.0, "published, compiled": 5.0, "skipkernels": 6.0, "skipkernels, graphed": 2.5},
    "floor_ms": 1.5,
    "faster": {"published": 3.6, "published, compiled": 2.0},
}
MACHINE = {"device": "A GPU", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"}


def summarised(folder: Path) -> dict[str, str]:
    lines = list(summary.lines_of(folder))
    assert len(lines) == 10
    return dict(line.split(": ", 1) for line in lines)


def test_summary_without_results(tmp_path):
    for name, text in summarised(tmp_path / "nothing").items():
        assert "not run" in text, name


def test_summary_of_results(tmp_path):
    facts = {"machine": MACHINE, "absent_peers": ["xformers"]}
    summary.write_facts(tmp_path, facts)
    fp32 = {name: {k: v for k, v in STEP[name].items() if k != summary.COMPILED} for name in ("ms", "faster")}
    summary.write_facts(tmp_path, {"step bf16": STEP, "step fp32": STEP | fp32 | {"difference": 1e-7}})
    (tmp_path / "tests.txt").write_text("FAILED a.py::b[1]\nE\nFAILED a.py::b[1] - E\n1 failed, 812 passed in 99.00s\n")
    (tmp_path / "step.txt").write_text("worst gradient in bf16, of x: off by 1e-3\nthe steps disagree: no timing\n")
    rows = [
        {"group": group, "params": {"implementation": name}, "stats": {"median": median}}
        for group, name, median in [
            ("one", "skipkernels", 1), ("one", "eager", 2), ("two", "skipkernels", 2), ("two", "Liger", 1),
            ("three", "eager", 1),
        ]
    ]  # fmt: skip
    (tmp_path / "operators.json").write_text(json.dumps({"benchmarks": rows}))
    (tmp_path / "memcheck.txt").write_text("========= ERROR SUMMARY: 0 errors\n")
    (tmp_path / "ncu.txt").write_text('==PROF== Profiling "_a_kernel": 0%\n==PROF== Profiling "_b_kernel": 0%\n')
    assert summarised(tmp_path) == {
        "machine": "A GPU, torch 2.11.0, Triton 3.6.0, commit abc1234; peers that cannot run: xformers",
        "tests": "812 passed, 1 failed: a.py::b[1] (goal: 0)",
        "gradients": "bf16, of x: off by 1e-3; the steps disagree: no timing",
        "replays and eager steps": "bf16 equal in all bits; "
        "fp32 differ: a weight by 1.0e-07 of its norm (goal: equal bits)",
        "launches": "bf16 357 kernels and 33 copies or fills; fp32 357 kernels and 33 copies or fills",
        "step": "bf16 2.5 ms as a graph, 6.0 ms eager, 9.0 ms published, 5.0 ms published, compiled; "
        "fp32 2.5 ms as a graph, 6.0 ms eager, 9.0 ms published",
        "against the floor": "bf16 1.67 times 1.5 ms; fp32 1.67 times 1.5 ms",
        "against the published step": "bf16 3.60 times as fast as published, 2.00 times as fast as published, compiled "
        "(goal: at least 3); fp32 3.60 times as fast as published",
        "operators": "2 cases compared, another implementation is faster in 1: two (goal: 0)",
        "sanitizer and profiler": "memcheck 0 errors; racecheck not run; ncu 2 kernels profiled",
    }


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({"captured": False}, "no graph was captured"),
        ({"difference": float("inf")}, "keep other classes (goal: equal bits)"),
    ],
)
def test_summary_of_replays_that_are_not_equal(tmp_path, step, text):
    summary.write_facts(tmp_path, {"step bf16": STEP | step})
    assert summarised(tmp_path)["replays and eager steps"] == f"bf16 {text}; fp32 not run"


def test_failed_tests_are_named_when_the_tests_are_cut_off(tmp_path):
    """Lines of pytest-xdist with -v, which come at once; the summary of pytest does not."""
    lines = (
        "test_a.py::test_n[0] \n[gw1] [ 25%] PASSED test_a.py::test_n[0] \n[gw0] [ 50%] FAILED test_a.py::test_n[1] \n"
    )
    (tmp_path / "tests.txt").write_text(lines)
    (tmp_path / "log.txt").write_text("tests: exit status 137, 12 s since the start\n")
    assert summarised(tmp_path)["tests"] == "cut off, 1 failed: test_a.py::test_n[1] (goal: 0)"


def test_summary_of_stages_without_a_result(tmp_path):
    for stage in ("step", "operators", "memcheck"):
        (tmp_path / f"{stage}.txt").write_text("Traceback\n")
    (tmp_path / "log.txt").write_text(
        "step: exit status 1, 9 s\nstep: exit status 124, 60 s\nmemcheck: exit status 127\n"
    )
    found = summarised(tmp_path)
    assert found["step"] == "bf16 cut off; fp32 not run" and found["operators"] == "no result, see operators.txt"
    assert found["sanitizer and profiler"] == "memcheck no result, see memcheck.txt; racecheck not run; ncu not run"


def test_summary_reads_the_facts_of_stages(tmp_path, capsys):
    for stage, printed in (("machine", "peer Liger: needs a GPU"), ("step", "skipkernels")):
        gpu.main([stage, *CUT, "--out", str(tmp_path)])
        assert printed in capsys.readouterr().out
    found = summarised(tmp_path)
    assert found["machine"].startswith(measure.machine(measure.CPU)["device"]) and "Liger" in found["machine"]
    assert "ms eager" in found["step"] and found["launches"] == "bf16 not run; fp32 not run"
