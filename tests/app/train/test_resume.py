"""Resuming runs: bitwise identical results, and refusal of other settings."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from skipkernels.app import report
from skipkernels.app.cli.main import main
from skipkernels.app.data import InputError
from skipkernels.app.methods.skip import Skip
from skipkernels.app.train import checkpoint, trainer, tune
from skipkernels.app.train.run_folder import read_metrics
from tests.app.runs import fails, files, losses, results, rows, shortened, small, stopped


def test_resume_is_bitwise_identical(run, tmp_path):
    stopped(tmp_path, step=3)  # before the first epoch is complete
    stopped(tmp_path, resume=True)
    assert len(rows(tmp_path)) == 1
    tune(small(tmp_path, resume=True))
    assert results(tmp_path) == results(run[0])
    assert files(tmp_path) == files(run[0])


@pytest.mark.parametrize("training", [{}, {"optimizer": 3}, [1]], ids=str)
def test_resume_refuses_foreign_training_state(copy, training):
    found = checkpoint.load(copy)
    foreign = found._replace(training=training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda run: foreign)
        with pytest.raises(InputError, match=r"checkpoint: not the training state of this run: .*`overwrite=True`\.$"):
            tune(small(copy, resume=True))
    assert checkpoint.load(copy).rows == found.rows, "the checkpoint is kept"


@pytest.mark.parametrize(
    "changes",
    [{"decay": 2.0, "precision": "bf16-sr", "fused_optimizer": True},
     {"optimizer": "AdamW", "text_lr": 1e-4, "image_lr": 1e-4, "warmup_epochs": 1, "warmup_lr": 1e-5,
      "sampler": "random", "delta": True}],
    ids=["fused bf16-sr", "AdamW delta"],
)  # fmt: skip
def test_resume_with_settings_is_bitwise_identical(tmp_path, monkeypatch, changes):
    """Dropout in each step draws from the global generator."""
    real = Skip.step
    monkeypatch.setattr(Skip, "step", lambda self, images, labels: real(self, F.dropout(images, 0.2), labels))
    changes |= {"max_classes": 12}  # two epochs of three steps
    tune(small(tmp_path / "whole", **changes))
    torch.manual_seed(2)  # another state of the caller's generator
    stopped(tmp_path / "cut", step=5, **changes)
    tune(small(tmp_path / "cut", resume=True, **changes))
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_resume_continues_views_of_cache(tmp_path):
    changes = {"refresh": "epoch", "max_classes": 12}
    tune(small(tmp_path / "whole", cache=tmp_path / "first", **changes))
    stopped(tmp_path / "cut", step=5, cache=tmp_path / "second", **changes)
    tune(small(tmp_path / "cut", cache=tmp_path / "second", resume=True, **changes))
    assert results(tmp_path / "cut")[1:] == results(tmp_path / "whole")[1:]


def test_resume_continues_crops_in_memory(tmp_path):
    """New crops in each epoch without a cache, of which a resumed run in other processes sees the same."""
    changes = {"refresh": "epoch", "max_classes": 12}
    tune(small(tmp_path / "whole", **changes))
    tune(small(tmp_path / "plain", max_classes=12))
    stopped(tmp_path / "cut", step=5, **changes)
    tune(small(tmp_path / "cut", workers=1, resume=True, **changes))
    assert results(tmp_path / "cut")[1:] == results(tmp_path / "whole")[1:]
    assert not set(losses(tmp_path / "whole")) & set(losses(tmp_path / "plain"))


def test_resume_of_complete_run(run, capsys):
    folder, metrics = run
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert tune(small(folder, resume=True), Console()) == metrics
    assert "the run is complete; there is nothing to resume" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_resume_writes_the_report_of_a_run_that_was_stopped_before_it(run, copy, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(report, "report_html", stop)
        tune(small(copy, resume=True))
    tune(small(copy, resume=True))
    assert files(copy) == files(run[0]) and results(copy) == results(run[0])


def test_resume_by_folder_of_killed_run(run, copy):
    """Files as after a kill between the checkpoint and the row of metrics.jsonl."""
    (copy / "metrics.jsonl").write_text("")
    assert main(["tune", "--resume", str(copy), "--log-every", "7", "--memory", "min", "--workers", "1"]) == 0
    assert "log_every: 7" in (copy / "config.yaml").read_text(), "settings without effect on results may differ"
    assert results(copy) == results(run[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shots", 3], "shots is 2 in the run in"), (["--out", "elsewhere"], "continues in RUN; leave out `out`"),
     (["--overwrite"], "pass only one")],
)  # fmt: skip
def test_resume_by_folder_refuses_settings(copy, arguments, message, capsys):
    assert message in fails(["tune", "--resume", copy, *arguments], capsys)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Run that was interrupted in its second epoch; no test changes it."""
    folder = tmp_path_factory.mktemp("interrupted")
    with shortened():
        stopped(folder)
    return folder


@pytest.fixture
def copy(interrupted, tmp_path):
    """Copy of an interrupted run."""
    return shutil.copytree(interrupted, tmp_path / "copy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 3}, "shots is 2 in the run in .*, and 3 here"),
        ({"epochs": 5}, "epochs is 2 in the run in .*, and 5 here"),
        ({"method": "full"}, "method is 'skip' in"),
        ({"delta": True}, "delta is False in"),
    ],
)
def test_resume_refuses_other_settings(copy, changes, message, capsys):
    arguments = {"shots": 2, "max_classes": 24, "epochs": 2, "out": copy, **changes}
    flags = [[f"--{k.replace('_', '-')}", *([] if v is True else [v])] for k, v in arguments.items()]
    said = fails(["tune", "--resume", *(part for flag in flags for part in flag)], capsys)
    assert re.search(message, said), said


def test_resume_refuses_damaged_checkpoint(copy, capsys):
    file = copy / "checkpoint" / "training.pt"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    arguments = ["--shots", 2, "--max-classes", 24, "--epochs", 2, "--out", copy]
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert "training.pt does not match checkpoint.json" in fails(["tune", "--resume", *arguments], capsys)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before, "nothing is lost"
    assert main(["tune", "--overwrite", *map(str, arguments), "--epochs", "1", "--max-classes", "4"]) == 0


def test_read_metrics_refuses_damaged_file(tmp_path):
    for text, reason in (("[]", "not a JSON object"), ('{"status": "com', "Unterminated")):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(InputError, match=rf"metrics\.json: damaged \(.*{reason}.*\)\. Restore it"):
            read_metrics(tmp_path)


def test_resume_refuses_other_training_images(copy, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "digest_tensors", lambda named: "others")
    message = fails(["tune", "--resume", "--shots", 2, "--max-classes", 24, "--epochs", 2, "--out", copy], capsys)
    assert "the training images differ" in message
