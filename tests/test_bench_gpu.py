"""bench/gpu.sh: every stage runs on the CPU, a stage that takes too long is cut off, and the total is bounded."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_stages, measure
from skipkernels.ops import precompile


@pytest.mark.slow
def test_dry_run(tmp_path):
    """The stages with a program in front of them; memcheck is like racecheck."""
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "x")}
    script = Path(gpu.__file__).with_name("gpu.sh")
    command = [script, "--dry-run", "--only", *(ran := ["tests", "racecheck", "ncu"])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log.txt").read_text()
    assert [line.split(",")[0] for line in log.splitlines()] == [f"{stage}: exit status 0" for stage in ran]
    assert "pytest" in (tmp_path / "tests.txt").read_text()
    for name, printed in (("sanitizer.txt", "racecheck"), ("ncu.txt", "--kernel-name regex:^(")):
        assert (
            f"stand-in --{'tool ' if name == 'sanitizer.txt' else 'clock-control none '}{printed}"
            in (tmp_path / name).read_text()
        )


def test_stages_of_a_dry_run_write_their_rows(tmp_path, monkeypatch, poisoned_memory, capsys):
    monkeypatch.setattr(torch, "compile", torch.compile)  # a dry run replaces it
    run = gpu_stages.Run(tmp_path, 0, dry_run=True)
    for stage in (gpu_stages.machine, gpu_stages.kernels, gpu_stages.step, gpu_stages.operators):
        stage(run)
    assert "skipkernels" in capsys.readouterr().out
    rows = {path.stem: [*csv.DictReader(path.open())] for path in tmp_path.iterdir()}
    assert rows.keys() == {"kernels", "step", "slowest", "operators"}
    assert {row["result"] for row in rows["kernels"]} == {"ok"}
    assert all(float(row["p50_ms"]) > 0 for row in rows["operators"])
    notes = {row["what"]: row["note"] for row in rows["step"]}
    assert len(notes) == 7 and notes["gradients"].startswith("ok") and notes["host syncs"] == "none"
    assert not [note for note in notes.values() if "failed" in note or "differs" in note]


def test_prepare_records_the_kernels_of_all_stages(monkeypatch):
    monkeypatch.setattr(torch, "compile", torch.compile)  # a dry run replaces it
    run = gpu_stages.Run(Path("sm_90"), 0, dry_run=True)
    launches = gpu_stages.launches_of_stages(run, precompile.ARCHITECTURES["sm_90"])
    kernels = {launch.kernel.fn.__name__ for launch in launches}
    assert {"_class_scores_kernel", "_add_layer_norm_fwd_kernel", "_sgd_momentum_kernel"} <= kernels
    dtypes = {launch.arguments["image_ptr"].dtype for launch in launches if "class_scores" in launch.kernel.fn.__name__}
    assert dtypes >= {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize("handler, ended", [("default_int_handler", "exit status -2, cut off"), ("SIG_IGN", "killed")])
def test_a_stage_is_cut_off(tmp_path, handler, ended):
    code = f"import signal, time; signal.signal(signal.SIGINT, signal.{handler})"
    code += "; print('begun', flush=True); time.sleep(60)"
    with (tmp_path / "log.txt").open("w") as output:
        assert gpu.run_limited([sys.executable, "-c", code], output, 5) == ended
    assert (tmp_path / "log.txt").read_text().startswith("begun")


def test_stages_fit_the_total():
    assert sum(stage.seconds for stage in gpu.STAGES) == gpu.TOTAL < 540
    assert len({"kernels.csv", "step.csv", "slowest.csv", "operators.csv", *(s.file for s in gpu.STAGES)}) <= 8


def test_a_gpu_is_timed_with_events(monkeypatch):
    """Events stand for the clock of the GPU, which is at 5 ms before the call and at 7 ms after it."""
    clock = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = 7.0 if clock else 5.0

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, last: Event) -> float:
            return last.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    assert measure.seconds_of(lambda: clock.append(1), torch.device("cuda", 0)) == pytest.approx(0.002)
