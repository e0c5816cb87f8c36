"""Resuming runs: bitwise identical results, and refusal of other settings."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.methods.lora import LoRA
from skipkernels.app.methods.skip import Skip
from skipkernels.app.train import checkpoint, evaluate_run, tune
from skipkernels.app.train.run_folder import RunFolder, read_metrics
from tests.app.train.runs import fails, files, results, rows, shortened, small


def stopped(folder, method_class=Skip, step: int = 9, **changes) -> None:
    """Start a run that is interrupted in a step, by default the third of the second epoch."""
    calls, original = iter(range(1, 1000)), method_class.step

    def interrupted(self, *args):
        if next(calls) == step:
            raise KeyboardInterrupt
        return original(self, *args)

    method_class.step = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            tune(small(folder, **changes))
    finally:
        method_class.step = original


def test_resume_is_bitwise_identical(run, tmp_path):
    stopped(tmp_path)
    assert "interrupted" in (tmp_path / "metrics.json").read_text()
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


BROKEN = {
    "deep": ("[" * 100_000, "nested too deeply"),
    "list": ("[]", "not a JSON object"),
    "nan": ('{"epochs": NaN}', "NaN is not a finite number"),
    "empty": ("{}", "status: Field required"),
    "large": (" " * ((1 << 24) + 1), "more than 16777216 bytes"),
    "epochs": ({"epochs": -2}, "epochs: Input should be greater than or equal to 0"),
    "tuned": ({"tuned": None}, "status is complete, but tuned is incomplete"),
    "cost": ({"cost": {"device": 0}}, "cost.device: Input should be"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_read_metrics_refuses_damaged_file(run, tmp_path, kind):
    content, message = BROKEN[kind]
    if isinstance(content, dict):
        content = json.dumps(json.loads((run[0] / "metrics.json").read_text()) | content)
    (tmp_path / "metrics.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=rf"metrics\.json: damaged \(.*{message}.*\)\. Restore it") as caught:
        read_metrics(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["metrics.json", "config.yaml"])
def test_resume_refuses_pipe(run, tmp_path, name):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=r"not a regular file" if name == "metrics.json" else "no config.yaml of"):
        RunFolder(small(folder, resume=True).resolved())
    with pytest.raises(InputError, match="not a regular file"):
        read_metrics(folder) if name == "metrics.json" else TuneConfig.from_yaml(folder / name)


@pytest.mark.parametrize(
    "changes",
    [{"classes": 24, "shots": 2, "decay": 2.0, "precision": "bf16-sr"}, {"fused_optimizer": True, "precision": "bf16"},
     {"optimizer": "AdamW", "text_lr": 1e-4, "image_lr": 1e-4, "warmup_epochs": 1, "warmup_lr": 1e-5,
      "sampler": "random", "skip_layers": 0, "delta": True}],
    ids=lambda changes: " ".join(f"{k}={v}" for k, v in changes.items()),
)  # fmt: skip
def test_resume_with_settings_is_bitwise_identical(tmp_path, changes):
    tune(small(tmp_path / "whole", **changes))
    stopped(tmp_path / "cut", **changes)
    assert len(rows(tmp_path / "cut")) == 1
    tune(small(tmp_path / "cut", resume=True, **changes))
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_resume_restores_global_generator(tmp_path, monkeypatch):
    """A step of which dropout draws from the global generator."""
    real = LoRA.step
    monkeypatch.setattr(LoRA, "step", lambda self, images, labels: real(self, F.dropout(images, 0.2), labels))
    changes = {"method": "lora", "batch_size": 4, "epochs": 2}
    torch.manual_seed(1)  # another state of the caller's generator in each run
    tune(small(tmp_path / "whole", **changes))
    torch.manual_seed(2)
    stopped(tmp_path / "cut", LoRA, **changes)
    torch.manual_seed(3)
    tune(small(tmp_path / "cut", resume=True, **changes))
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.parametrize("changes", [{"views": 2}, {"refresh": "epoch"}], ids=["views", "refresh"])
def test_resume_continues_views_of_cache(tmp_path, changes):
    tune(small(tmp_path / "whole", cache=tmp_path / "first", epochs=3, **changes))
    stopped(tmp_path / "cut", cache=tmp_path / "second", epochs=3, **changes)
    tune(small(tmp_path / "cut", cache=tmp_path / "second", epochs=3, resume=True, **changes))
    assert results(tmp_path / "cut")[1:] == results(tmp_path / "whole")[1:]


def test_resume_before_first_epoch_starts(run, tmp_path):
    stopped(tmp_path, step=3)  # before the first epoch is complete
    tune(small(tmp_path, resume=True))
    assert results(tmp_path) == results(run[0])


def test_resume_of_complete_run(run, capsys):
    folder, metrics = run
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert tune(small(folder, resume=True), Console()) == metrics
    assert "the run is complete; there is nothing to resume" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    arguments = ["--shots", "4", "--classes", "12", "--epochs", "2", "--resume", "--out", str(folder)]
    assert main(["tune", *arguments]) == 0


def test_resume_by_folder(run, tmp_path, capsys):
    stopped(tmp_path)
    assert main(["tune", "--resume", str(tmp_path), "--log-every", "7"]) == 0
    assert results(tmp_path) == results(run[0])
    assert "log_every: 7" in (tmp_path / "config.yaml").read_text(), "a setting without effect on results may differ"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--shots", 3], "shots is 4 in the run in"), (["--out", "elsewhere"], "continues in RUN; leave out --out"),
     (["--overwrite"], "pass only one")],
)  # fmt: skip
def test_resume_by_folder_refuses_settings(copy, arguments, message, capsys):
    assert message in fails(["tune", "--resume", copy, *arguments], capsys)


def test_resume_refuses_two_folders(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--resume", "a", "b"])
    assert "one folder; got a b" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_resume_refuses_folder_without_run(tmp_path, capsys):
    assert "config.yaml: no such file" in fails(["tune", "--resume", tmp_path], capsys)
    with pytest.raises(InputError, match="no such file"):
        tune(TuneConfig(resume=tmp_path))


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


def test_resume_of_killed_run(run, copy):
    """Files as after a kill between the checkpoint and the row of metrics.jsonl."""
    (copy / "metrics.json").unlink()
    (copy / "metrics.jsonl").write_text("")
    tune(small(copy, resume=True))
    assert results(copy) == results(run[0])


def test_resume_refuses_run_of_version_0_2(copy):
    """A run of 0.2 has state.pt beside its weights; without it, epochs would be lost."""
    shutil.rmtree(copy / "checkpoint")
    with pytest.raises(InputError, match="contains a run without its checkpoint folder"):
        tune(small(copy, resume=True))
    torch.save({"format": 2}, copy / "state.pt")
    with pytest.raises(
        InputError, match=r"was stopped by skipkernels 0\.2, .*; continue with 0\.2, or tune again with"
    ):
        tune(small(copy, resume=True))
    assert evaluate_run(copy) == rows(copy)[0]["accuracy"], "its model can be used"
    assert tune(small(copy, overwrite=True))["epochs"] == 2


def test_run_of_version_0_2_is_complete(run, tmp_path):
    """Its metrics have the times of the parts of a forward, and classifier.json no digest in the first versions."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "state.pt").touch()
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["cost"]["forward_milliseconds"] = {"loss": 1.0}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    classifier = json.loads((folder / "classifier.json").read_text())
    del classifier["weights_xxh3"]
    (folder / "classifier.json").write_text(json.dumps(classifier))
    assert tune(small(folder, resume=True)) == metrics
    assert evaluate_run(folder) == metrics["tuned"]
    assert sk.Classifier.load(folder, device="cpu").classes == classifier["classes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 3}, "shots is 4 in the run in .*, and 3 here"),
        ({"epochs": 5}, "epochs is 2 in the run in .*, and 5 here"),
        ({"method": "full"}, "method is 'skip' in"),
        ({"delta": True}, "delta is False in"),
    ],
)
def test_resume_refuses_other_settings(copy, changes, message, capsys):
    arguments = {"shots": 4, "classes": 12, "epochs": 2, "out": copy, **changes}
    flags = [[f"--{k.replace('_', '-')}", *([] if v is True else [v])] for k, v in arguments.items()]
    said = fails(["tune", "--resume", *(part for flag in flags for part in flag)], capsys)
    assert re.search(message, said), said


@pytest.mark.parametrize("changes", [{"log_every": 7}, {"memory": "min"}, {"workers": 1}], ids=str)
def test_resume_accepts_settings_without_effect(copy, changes):
    assert tune(small(copy, resume=True, **changes))["status"] == "complete"


def test_resume_refuses_damaged_checkpoint(copy, capsys):
    file = copy / "checkpoint" / "training.pt"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    arguments = ["--shots", 4, "--classes", 12, "--epochs", 2, "--out", copy]
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert "training.pt does not match checkpoint.json" in fails(["tune", "--resume", *arguments], capsys)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before, "nothing is lost"
    assert main(["tune", "--overwrite", *map(str, arguments)]) == 0


def test_resume_refuses_other_training_images(copy, monkeypatch, capsys):
    from skipkernels.app.train import trainer

    monkeypatch.setattr(trainer, "digest_tensors", lambda named: "others")
    message = fails(["tune", "--resume", "--shots", 4, "--classes", 12, "--epochs", 2, "--out", copy], capsys)
    assert "the training images differ" in message
