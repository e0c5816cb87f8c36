"""Resuming runs: bitwise identical results, and refusal of other settings."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.methods import METHODS
from skipkernels.app.report import run_page
from skipkernels.app.train import evaluate_run, trainer, tune
from skipkernels.app.train.reading import unfinished
from tests.app.runs import fails, files, results, small, stopped
from tests.failures import Killed, stopped_at

ADAMW = {"optimizer": "adamw", "text_lr": 1e-4, "image_lr": 1e-4, "warmup_epochs": 1, "warmup_lr": 1e-5}
# Settings of a run of two epochs of two steps, and the steps in which it is interrupted: each after a resume.
RUNS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "before the first epoch and after it": ({"method": "skip"}, [1, 4]),
    "bf16": ({"method": "skip", "decay": 2.0, "precision": "bf16"}, [4]),
    "AdamW": ({"method": "skip", "sampler": "random"} | ADAMW, [4]),
    "fp16": ({"method": "skip", "precision": "fp16"}, [4]),
    "head of a blend": ({"method": "skip", "head": "anchored", "blend": 0.5}, [4]),
    "crops": ({"method": "skip", "refresh": "epoch"}, [4]),
    "best epoch": ({"method": "skip", "validation": 0.5, "epochs": 4}, [3]),  # of one step
}
# Other methods that train in steps.
OTHERS = [name for name in METHODS if name not in ("skip", "zero-shot", "linear-probe")]
RUNS |= {name: ({"method": name, "batch_size": 4}, [4]) for name in OTHERS}


@pytest.mark.parametrize("name", RUNS)
def test_resume_gives_equal_bits(tmp_path, monkeypatch, name):
    """Dropout in each step draws from the global generator. The crops of the resumed run are made in a process."""
    changes, interruptions = RUNS[name]
    method = METHODS[changes["method"]]
    real = method.step
    monkeypatch.setattr(method, "step", lambda self, images, labels: real(self, F.dropout(images, 0.2), labels))
    monkeypatch.setattr(trainer, "_INITIAL_SCALE", 2.0**19)  # the gradients of the first step overflow in fp16
    changes = {"max_classes": 8} | changes
    tune(small(tmp_path / "whole", **changes))
    torch.manual_seed(2)  # another state of the caller's generator
    for number, step in enumerate(interruptions):
        stopped(tmp_path / "cut", step=step, resume=tmp_path / "cut" if number else None, **changes)
    workers = {"workers": 1} if name == "crops" else {}
    metrics = tune(resume=tmp_path / "cut", **workers)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert evaluate_run(tmp_path / "cut") == metrics["tuned"]


@pytest.mark.slow
def test_killed_run_resumes_to_equal_bits(tmp_path):
    """Killed at every eleventh call that changes a folder: while files are begun, replaced and deleted."""
    changes = {"epochs": 3, "shots": 1, "max_classes": 4, "validation": 0.5}  # the best epoch is seldom the last
    whole = tmp_path / "whole"
    with stopped_at(0) as made:
        tune(small(whole, **changes))
    for moment in range(1, len(made), 11):
        folder = tmp_path / f"{moment}"
        with pytest.raises(Killed), stopped_at(moment, "kill"):
            tune(small(folder, **changes))
        if (folder / "config.yaml").exists() and unfinished(folder):
            sk.Classifier.load(folder, device="cpu")
        tune(small(folder, resume=folder if (folder / "config.yaml").exists() else None, **changes))
        assert results(folder) == results(whole) and files(folder) == files(whole)
        assert not [*folder.glob(".checkpoint*"), *folder.glob(".*.partial")]


# ---- by the folder of a run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Run that was interrupted in its second epoch; no test changes it."""
    folder = tmp_path_factory.mktemp("interrupted")
    stopped(folder)
    return folder


@pytest.fixture
def copy(interrupted, tmp_path):
    """Copy of an interrupted run."""
    return shutil.copytree(interrupted, tmp_path / "copy")


def test_resume_of_complete_run(run, capsys, monkeypatch):
    folder, metrics = run
    monkeypatch.setenv("HOME", str(folder.parent))
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert tune(small(folder, resume=folder), Console()) == metrics
    assert "the run is complete; there is nothing to resume" in capsys.readouterr().out
    assert tune(resume=f"~/{folder.name}") == metrics
    assert main(["tune", f"--resume=~/{folder.name}"]) == 0
    assert "trained classes" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert main(["report", f"~/{folder.name}"]) == 0


def test_resume_writes_the_report_of_a_run_that_was_stopped_before_it(run, copy, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_page, "report_html", stop)
        tune(resume=copy)
    tune(resume=copy)
    assert files(copy) == files(run[0]) and results(copy) == results(run[0])


def test_resume_by_folder_of_killed_run(run, copy):
    """Files as after a kill between the checkpoint and the row of metrics.jsonl."""
    (copy / "metrics.jsonl").write_text("")
    assert main(["tune", "--resume", str(copy), "--memory", "min", "--workers", "1"]) == 0
    assert "memory: min" in (copy / "config.yaml").read_text(), "settings without effect on results may differ"
    assert results(copy) == results(run[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "RUN", "--shots", "3"], "shots is 2 in the run in RUN, and 3 here"),
        (["--resume", "RUN", "--method", "auto"], "method is 'skip' in the run in RUN, and 'auto' here"),
        (["--resume", "RUN", "--epochs", "5"], "epochs is 2 in the run in RUN, and 5 here"),
        (["--resume", "RUN", "--out", "elsewhere"], "--resume: continues the run in its folder; leave out --out"),
        (["--resume", "RUN", "--overwrite"], "--resume: continues the run in its folder; leave out --out and --over"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_resume_refuses_other_settings(copy, arguments, message, capsys):
    said = fails(["tune", *(str(copy) if word == "RUN" else word for word in arguments)], capsys)
    assert message in said.replace(str(copy), "RUN")


def test_resume_refuses_other_training_images(copy, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "digest_tensors", lambda named: "others")
    assert "the training images differ" in fails(["tune", "--resume", copy], capsys)
