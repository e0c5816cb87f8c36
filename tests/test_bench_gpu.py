"""bench/gpu.sh: its stages and its summary."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from bench import gpu, gpu_summary, inputs, measure, training
from bench.rows import machine_columns
from skipkernels import testing
from skipkernels.graphs import graphed_step

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
        ("full", "fuse-fast"),
    ],
)
def test_stages_run_on_the_cpu(stage, printed, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    gpu.main([stage, *CUT])
    assert printed in capsys.readouterr().out


def script(folder: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with `echo` in place of Python."""
    environment = os.environ | {"PYTHON": "echo", "OUT": str(folder)} | environment
    return subprocess.run([SCRIPT, *stages], capture_output=True, text=True, env=environment)


def test_script_runs_every_stage(tmp_path, monkeypatch):
    """One that cannot run does not stop the others; bench.gpu knows the options of each."""
    called = {stage.__name__: Mock(__name__=stage.__name__) for stage in gpu.STAGES}
    monkeypatch.setattr(gpu, "STAGES", called.values())
    *stages, summarised = script(tmp_path, STEP=" ".join(CUT)).stdout.splitlines()
    assert summarised == f"-m bench.gpu_summary {tmp_path}"
    statuses = dict(re.match(r"(\w+): exit status (\d+), \d+ s since", stage).groups() for stage in stages)
    assert list(statuses) == "machine tests step step_fp32 full operators profile memcheck racecheck ncu".split()
    for stage in ("machine", "step", "step_fp32", "full", "profile"):
        assert statuses[stage] == "0"
        *_, command = (tmp_path / f"{stage}.txt").read_text().splitlines()
        gpu.main(command.removeprefix("-m bench.gpu ").split())
    assert [call.args[0].precision for call in called["step"].call_args_list] == ["bf16", "fp32"]
    assert {name for name, stage in called.items() if not stage.called} == {"one_step", "smoke"}  # of other programs


def test_script_runs_the_named_stages_and_scales_their_limits(tmp_path):
    (tmp_path / "scale").write_text("250\n")
    assert re.findall(r"(\w+): exit status 0", script(tmp_path, "tune", "step").stdout) == ["step", "tune"]
    assert {path.name for path in tmp_path.iterdir()} == {"scale", "log.txt", "step.txt", "tune.txt"}
    step = f"-m bench.gpu step --precision bf16 --all-shapes --seconds {2.5 * 116:.0f} --out {tmp_path}\n"
    assert (tmp_path / "step.txt").read_text() == step
    assert (tmp_path / "tune.txt").read_text() == f"-m bench.tune --seconds {2.5 * 570:.0f} --out {tmp_path}\n"


def test_script_refuses_an_unknown_stage(tmp_path):
    done = script(tmp_path / "out", "machine", "steps")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "no stage steps; expected some of: machine tests step step_fp32 full " in done.stderr
    assert done.stderr.endswith("summary tune\n")


@pytest.mark.parametrize(
    ("bandwidth", "cores", "scale"),
    [(3e12, 16, 1.0), (1.25e12, 16, 2.0), (3e12, 4, 2.0), (2.4e11, 2, 4.0)],
    ids=["H100", "half as fast", "few cores", "T4"],
)
def test_limits_scale_with_the_machine(bandwidth, cores, scale):
    assert gpu.scale_of(bandwidth, cores) == scale


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """The CPU in place of a GPU: every path but the capture and the counting of launches."""
    monkeypatch.setattr(gpu, "_random_inputs", lambda *case: inputs.random_inputs(*case[:3], measure.CPU))
    monkeypatch.setattr(gpu, "launches_of", lambda run, device: {"kernels": 1, "copies": 2})
    monkeypatch.setattr(training.Published, "compiled", lambda published, precision, mode: published.step(precision))
    monkeypatch.setattr(measure, "seconds_of", lambda function, device, calls=1, before=None: 0.001 * calls)


@pytest.mark.parametrize("captured", [False, True])
def test_step_writes_its_facts_on_a_gpu(as_on_a_gpu, monkeypatch, tmp_path, captured):
    """An eager fallback is not called a graph."""
    monkeypatch.setattr(graphed_step.GraphedStep, "is_captured", captured)
    gpu.main(["step", *CUT, "--precision", "bf16", "--batch", "2", "--device", "cuda", "--out", str(tmp_path)])
    found = gpu_summary.read_facts(tmp_path)["step bf16 B2 C20"]
    theirs = {gpu_summary.PUBLISHED, *gpu_summary.COMPILED.values()}
    ours = {gpu_summary.EAGER, gpu_summary.GRAPHED} if captured else {gpu_summary.EAGER}
    assert found["ms"].keys() == ours | theirs and found["faster"].keys() == theirs
    assert set(found["ms"].values()) == {10.0} and found["difference"] == found["eager_difference"] == 0
    assert (found["captured"], found["launches"]) == (captured, {"kernels": 1, "copies": 2})


def test_all_shapes_within_the_time(as_on_a_gpu, monkeypatch, tmp_path):
    """All of them without torch.compile, then with it; one without memory does not stop the others."""
    began = []

    def step_of_shape(args, compiles, compares):
        began.append((args.batch, args.classes, compiles, compares))
        if args.classes == 10000:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "step_of_shape", step_of_shape)
    times = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    gpu.main([*"step --precision bf16 --all-shapes --device cuda --seconds 8 --out".split(), str(tmp_path)])
    assert [(B, C) for B, C, *_ in began] == [*gpu._SHAPES, *gpu._SHAPES[:2]]
    assert [compiles for *_, compiles, _ in began] == [False] * 6 + [True] * 2
    assert [compares for *_, compares in began] == [True] + [False] * 7
    facts = gpu_summary.read_facts(tmp_path)
    assert facts["step bf16 B4 C10000"] == {"step": "out of memory", "compiled": "no time left"}
    assert facts["step bf16 B4 C100"] == {"compiled": "no time left"} and "step bf16 B4 C1000" not in facts


def test_replays_are_compared_in_bits(monkeypatch):
    """Without a GPU both steps are eager; the test of the facts of a step has equal ones."""
    args = argparse.Namespace(
        model="vit-tiny", batch=4, classes=20, device=measure.CPU, skip_layers=3, precision="bf16"
    )
    made, made_as = [], gpu.graphed_step

    def another(*arguments, **options):
        run, step = made_as(*arguments, **options)
        made.append(step._clip.model.visual.proj)
        if len(made) == 3:
            made[2].data[0, 0] += 1e-7
        return run, step

    monkeypatch.setattr(gpu, "graphed_step", another)
    eager, replayed = gpu.differences(args)
    assert eager == 0 < replayed < 1e-5


# ---- the summary -----------------------------------------------------------------------------------------------------

STEP = {
    "captured": True,
    "eager_difference": 0.0,
    "difference": 0.0,
    "launches": {"kernels": 357, "copies": 33},
    "B": 4,
    "ms": {"published": 9.0, "published, compiled": 5.0, "skipkernels": 6.0, "skipkernels, graphed": 2.5},
    "floor_ms": 1.5,
    "faster": {"published": 3.6, "published, compiled": 2.0},
}
MACHINE = {"device": "NVIDIA H100 PCIe", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"}


def summarised(folder: Path) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in gpu_summary.lines_of(folder))


def test_summary_without_results(tmp_path):
    found = summarised(tmp_path / "nothing")
    assert len(found) == 8
    for name, text in found.items():
        assert "not run" in text, name


def test_summary_of_results(tmp_path, monkeypatch, capsys):
    facts = {"machine": MACHINE, "absent_peers": ["xformers"]}
    gpu_summary.write_facts(tmp_path, facts | {"step bf16 B4 C1000": STEP})
    without = {name: {k: v for k, v in STEP[name].items() if k != "published, compiled"} for name in ("ms", "faster")}
    late = STEP | without | {"compiled": "no time left"}
    gpu_summary.write_facts(tmp_path, {"step bf16 B32 C1000": late, "step fp32 B4 C1000": {"step": "out of memory"}})
    gpu_summary.write_facts(tmp_path, {"full": {"B": 8, "ms": {"eager": 3.0, "fuse-fast": 2.0}}})
    (tmp_path / "tests.txt").write_text("FAILED a.py::b[1]\nE\nFAILED a.py::b[1] - E\n1 failed, 812 passed in 99.00s\n")
    (tmp_path / "step.txt").write_text("worst gradient in bf16, of x: off by 1e-3\nthe steps disagree: no timing\n")
    rows = [
        {"group": group, "implementation": name, "p50_ms": median}
        for group, name, median in [
            ("one", "skipkernels", 1), ("one", "eager", 2), ("two", "skipkernels", 2), ("two", "Liger", 1),
            ("three", "eager", 1),
        ]
    ]  # fmt: skip
    cut_off = '{"group": "four"'
    (tmp_path / "operators.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + cut_off)
    (tmp_path / "memcheck.txt").write_text("========= ERROR SUMMARY: 0 errors\n")
    (tmp_path / "ncu.txt").write_text('==PROF== Profiling "_a_kernel": 0%\n==PROF== Profiling "_b_kernel": 0%\n')
    floor = "1.67 times the floor of 1.5 ms; 357 kernels and 33 copies or fills; replays equal in all bits"
    expected = {
        "machine": "NVIDIA H100 PCIe, torch 2.11.0, Triton 3.6.0, commit abc1234; peers that cannot run: xformers",
        "tests": "812 passed, 1 failed: a.py::b[1] (goal: 0)",
        "gradients": "bf16, of x: off by 1e-3; the steps disagree: no timing",
        "step bf16 B4 C1000": "2.5 ms as a graph, 6.0 ms eager, 9.0 ms published, 5.0 ms published, compiled; "
        f"{floor}; 3.60 times as fast as published, 2.00 times as fast as published, compiled "
        "(goal: at least 3, compiled)",
        "step bf16 B32 C1000": "2.5 ms as a graph, 6.0 ms eager, 9.0 ms published; "
        f"{floor}; 3.60 times as fast as published; compiled: no time left",
        "step fp32 B4 C1000": "out of memory",
        "full training": "8 pairs: 3.0 ms eager, 2.0 ms fuse-fast",
        "operators": "2 cases compared, another implementation is faster in 1: two (goal: 0)",
        "sanitizer and profiler": "memcheck 0 errors; racecheck not run; ncu 2 kernels profiled",
    }
    assert summarised(tmp_path) == expected
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    gpu_summary.main()
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["operators"] == rows and written["facts"]["machine"] == MACHINE
    assert written["summary"] == capsys.readouterr().out.splitlines() == [f"{k}: {v}" for k, v in expected.items()]


@pytest.mark.parametrize(
    ("step", "device", "text"),
    [
        ({"captured": False}, "", "no graph was captured"),
        ({"difference": float("inf")}, "", "replays keep other classes (goal: equal bits)"),
        ({"difference": 1e-7}, "", "replays differ by 1.0e-07 (goal: equal bits)"),
        ({"eager_difference": 2e-7, "difference": 1e-7}, "", "eager steps differ from each other by 2.0e-07, replays"),
        ({"B": 32}, "NVIDIA H100 80GB HBM3", "published, compiled (goal: at least 2, compiled)"),
        ({}, "NVIDIA A100", "2.00 times as fast as published, compiled$"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_summary_of_a_step(tmp_path, step, device, text):
    gpu_summary.write_facts(tmp_path, {"machine": MACHINE | {"device": device}, "step bf16 B4 C1000": STEP | step})
    assert re.search(re.escape(text).replace(r"\$", "$"), summarised(tmp_path)["step bf16 B4 C1000"])


def test_summary_of_stages_without_a_result(tmp_path):
    for stage in ("step", "operators", "memcheck"):
        (tmp_path / f"{stage}.txt").write_text("Traceback\n")
    (tmp_path / "log.txt").write_text(
        "step: exit status 1, 9 s\nstep: exit status 124, 60 s\nmemcheck: exit status 127\n"
    )
    found = summarised(tmp_path)
    assert found["step bf16"] == "cut off" and found["step fp32"] == "not run"
    assert found["operators"] == "no result, see operators.txt"
    assert found["sanitizer and profiler"] == "memcheck no result, see memcheck.txt; racecheck not run; ncu not run"


def test_summary_reads_the_facts_of_stages(tmp_path, capsys):
    for stage, printed in (("machine", "peer Liger: needs a GPU"), ("step", "skipkernels")):
        gpu.main([stage, *CUT, "--out", str(tmp_path)])
        assert printed in capsys.readouterr().out
    found = summarised(tmp_path)
    assert found["machine"].startswith(machine_columns(measure.CPU)["device"]) and "Liger" in found["machine"]
    assert "ms eager" in found["step bf16 B4 C20"] and found["step fp32"] == "not run"
    assert (tmp_path / "scale").read_text() == f"{round(100 * gpu.scale_of(1e10, len(os.sched_getaffinity(0))))}\n"
