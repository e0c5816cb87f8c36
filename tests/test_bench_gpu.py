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
from bench.rows import of_pytest
from skipkernels.ops import precompile


def test_dry_run(tmp_path):
    """A stage with a program in front of it; the other stages run in the tests below."""
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "x")}
    script = Path(gpu.__file__).with_name("gpu.sh")
    command = [script, "--dry-run", "--only", "racecheck"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.startswith("racecheck: exit status 0, ")
    output = (tmp_path / "sanitizer.txt").read_text()
    assert "stand-in --tool racecheck " in output and "class_scores: " in output and "add_layer_norm: " in output


def test_kernels_that_take_longest_are_selected(tmp_path):
    count = ["--launch-count", "40"]
    assert gpu.selection(tmp_path) == ["--kernel-name", "regex:^(_.*_kernel)$", *count]
    (tmp_path / "slowest.csv").write_text("kernel,ours\n_first_kernel,1\nmm,0\n_second_kernel,1\n")
    assert gpu.selection(tmp_path) == ["--kernel-name", "regex:^(_first_kernel|_second_kernel)$", *count]


def test_stages_of_a_dry_run_write_their_rows(tmp_path, monkeypatch, poisoned_memory, capfd):
    monkeypatch.setattr(torch, "compile", torch.compile)  # a dry run replaces it
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # in a process of xdist pytest-benchmark times nothing
    run = gpu_stages.Run(tmp_path, 0, dry_run=True)
    for stage in gpu.STAGES:
        assert not getattr(gpu_stages, stage.runs or stage.name)(run)
    output = capfd.readouterr().out
    assert "skipkernels" in output and "pytest" in output
    rows = {path.stem: [*csv.DictReader(path.open())] for path in tmp_path.glob("*.csv")}
    assert rows.keys() == {"kernels", "step", "slowest"}
    assert {row["result"] for row in rows["kernels"]} == {"ok"}
    timed = of_pytest(tmp_path / "operators.json")
    assert {row["op"] for row in timed} == {*run.sizes.operators} and all(float(row["p50_ms"]) > 0 for row in timed)
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
    assert len({"kernels.csv", "step.csv", "slowest.csv", "operators.json", *(s.file for s in gpu.STAGES)}) <= 8


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
