"""bench/gpu.sh: its stages, and the results that it repeats."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import subprocess
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from bench import gpu, inputs, measure, training
from bench.rows import machine_columns
from skipkernels import testing
from skipkernels.graphs import graphed_step

CUT = "--model vit-tiny --classes 20 --skip-layers 3 --device cpu --rounds 1 --no-save".split()
SCRIPT = Path(gpu.__file__).with_name("gpu.sh")


@pytest.fixture(autouse=True)
def limits(monkeypatch) -> None:
    """Fixed limits of the machine, and no slow measurement of memory."""
    monkeypatch.setattr(testing, "peak_bytes", lambda function, device, **_: 0)
    monkeypatch.setattr(measure, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(measure, "bandwidth", lambda device: 1e10)


@pytest.mark.parametrize(
    "stage, printed",
    [
        ("machine", f"result: {machine_columns(measure.CPU)['device']}, torch "),
        ("step", "result: bf16, 4 images, 20 classes: skipkernels "),
        ("profile_step", "skipkernels::"),
        ("one_step", "loss: "),
        ("smoke", "class_scores: "),
        ("full", "result: 4 pairs: eager "),
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
    out = tmp_path / "out"
    *stages, archive = script(out, STEP=" ".join(CUT)).stdout.splitlines()
    statuses = dict(stage.split(": ", 1) for stage in stages)
    assert list(statuses) == "machine tests step step_fp32 full operators profile memcheck racecheck ncu".split()
    for stage in ("machine", "step", "step_fp32", "full", "profile"):
        assert statuses[stage].startswith("done (")
        *_, command = (out / f"{stage}.txt").read_text().splitlines()
        gpu.main(command.removeprefix("-m bench.gpu ").split())
    assert [call.args[0].precision for call in called["step"].call_args_list] == ["bf16", "fp32"]
    assert {name for name, stage in called.items() if not stage.called} == {"one_step", "smoke"}  # of other programs
    assert archive == f"all results: {out}.tgz"
    with tarfile.open(f"{out}.tgz") as files:
        assert {"out/summary.txt", *(f"out/{stage}.txt" for stage in statuses)} <= {*files.getnames()}
    assert (out / "summary.txt").read_text().splitlines() == stages


def test_script_runs_the_named_stages_and_scales_their_limits(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "machine.txt").write_text("limits of time: 250 %\ntorch==2.15\n")
    assert re.findall(r"(\w+): done", script(out, "tune", "step").stdout) == ["step", "tune"]
    assert {path.name for path in out.iterdir()} == {"machine.txt", "summary.txt", "step.txt", "tune.txt"}
    step = f"-m bench.gpu step --precision bf16 --all-shapes --seconds {2.5 * 116:.0f}\n"
    assert (out / "step.txt").read_text() == step
    assert (out / "tune.txt").read_text() == f"-m bench.tune --seconds {2.5 * 570:.0f} --out {out}\n"


@pytest.mark.parametrize(
    ("python", "ended"),
    [
        ("echo 'result: 2 ms'; echo more; exit 1", "full: exit status 1, see {}/full.txt (0 s)\n  result: 2 ms\n"),
        ("echo '[gw0] [5%] FAILED a'; exit 124", "full: cut off at its limit of 45 s (0 s)\n  [gw0] [5%] FAILED a"),
        ("exit 127", "full: {} is not installed (0 s)\n"),
    ],
)
def test_script_says_how_a_stage_ended(tmp_path, python, ended):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{python}\n")
    program.chmod(0o755)
    out = tmp_path / "out"
    found = script(out, "full", PYTHON=str(program)).stdout
    assert found.startswith(ended.format(program if python == "exit 127" else out))


def test_script_refuses_an_unknown_stage(tmp_path):
    done = script(tmp_path / "out", "machine", "steps")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "no stage steps; expected some of: machine tests step step_fp32 full " in done.stderr


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
    monkeypatch.setattr(gpu, "launches_of", lambda run, device: "1 kernel")
    monkeypatch.setattr(training.Published, "compiled", lambda published, precision, mode: published.step(precision))
    monkeypatch.setattr(measure, "seconds_of", lambda function, device, calls=1, before=None: 0.001 * calls)


@pytest.mark.parametrize(
    ("captured", "printed"),
    [
        (True, "skipkernels as a graph 10.0 ms; 0.00 times the floor of .* ms; 1 kernel; replays equal in all bits; "),
        (False, "published 10.0 ms; 0.00 times the floor of .* ms; no graph was captured; "),  # not called a graph
    ],
)
def test_step_on_a_gpu(as_on_a_gpu, monkeypatch, capsys, captured, printed):
    monkeypatch.setattr(graphed_step.GraphedStep, "is_captured", captured)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(gpu, "floor_of", lambda step, device: 10.0)
    gpu.main(["step", *CUT, "--precision", "bf16", "--batch", "4", "--device", "cuda"])
    results = [line for line in capsys.readouterr().out.splitlines() if line.startswith("result: ")]
    assert re.match(f"result: bf16, 4 images, 20 classes: .*{printed}1.00 times as fast as published$", results[0])
    assert re.match("result: bf16, 4 images, 20 classes, compiled: skipkernels 10.0 ms, published, comp", results[1])
    assert ("as a graph" in results[0] + results[1]) == captured
    assert results[1].endswith("1.00 times as fast as published, compiled with CUDA graphs (goal: 3)")


def test_all_shapes_within_the_time(as_on_a_gpu, monkeypatch, capsys):
    """All of them without torch.compile, then with it; one without memory does not stop the others."""
    began = []

    def step_of_shape(args, compiles, compares):
        began.append((args.batch, args.classes, compiles, compares))
        if args.classes == 10000:
            raise torch.OutOfMemoryError
        return "1 ms"

    monkeypatch.setattr(gpu, "step_of_shape", step_of_shape)
    times = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    gpu.main("step --precision bf16 --all-shapes --device cuda --seconds 8".split())
    assert [(B, C) for B, C, *_ in began] == [*gpu._SHAPES, *gpu._SHAPES[:2]]
    assert [compiles for *_, compiles, _ in began] == [False] * 6 + [True] * 2
    assert [compares for *_, compares in began] == [True] + [False] * 7
    results = capsys.readouterr().out.splitlines()
    assert results[0] == "result: bf16, 4 images, 1000 classes: 1 ms" and len(results) == 12
    assert results[4] == "result: bf16, 4 images, 10000 classes: out of memory"
    assert results[8] == "result: bf16, 4 images, 100 classes, compiled: no time left"


@pytest.mark.parametrize(
    ("eager", "replayed", "text"),
    [
        (0.0, 0.0, "replays equal in all bits"),
        (0.0, math.inf, "replays keep other classes (goal: equal bits)"),
        (0.0, 1e-7, "replays differ by 1.0e-07 (goal: equal bits)"),
        (2e-7, 1e-7, "eager steps differ from each other by 2.0e-07, replays from them by 1.0e-07"),
    ],
)
def test_differences_in_words(eager, replayed, text):
    assert gpu.comparison(eager, replayed) == text


def test_replays_are_compared_in_bits(monkeypatch):
    """Without a GPU both steps are eager, and have equal bits but for this change."""
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
