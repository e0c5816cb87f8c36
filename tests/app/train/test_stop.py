"""Runs that stop early, and the files they leave."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pty
import resource
import shutil
import signal
import sys
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.methods.base import StepOutput
from skipkernels.app.methods.lora import LoRA
from skipkernels.app.report import run_page
from skipkernels.app.results.files import read_metrics
from skipkernels.app.train import checkpoint, evaluate_run, tune, writing
from skipkernels.app.train.run import Run
from skipkernels.app.train.writing import RunFolder
from skipkernels.folders import locked
from tests.app.runs import at_step, fails, files, rows, small, stopped
from tests.app.train.test_checkpoint import CLASSIFIER, weights_of

ARGUMENTS = ["tune", "--method", "skip", "--shots", "2", "--max-classes", "24"]


def test_interrupt_keeps_last_epoch(tmp_path, capsys):
    stopped(tmp_path)
    assert files(tmp_path) == {"config.yaml", "metrics.jsonl", "checkpoint", "open_clip_config.json"}
    assert evaluate_run(tmp_path) == rows(tmp_path)[0]["accuracy"] and len(rows(tmp_path)) == 1
    (tmp_path / "image.png").write_bytes(b"")
    for command, code in ((["eval", tmp_path], 0), (["predict", tmp_path, tmp_path / "image.png"], 1)):
        assert main(list(map(str, command))) == code
        note = "without the head, the blend and the calibration of the end. Continue it with skipkernels tune --resume"
        assert f"{note} {tmp_path}" in capsys.readouterr().err
    with locked(tmp_path):
        assert main(["eval", str(tmp_path)]) == 0
    assert f"note: a run is in progress in {tmp_path}; its model is that of the last epoch" in capsys.readouterr().err


def test_interrupt_before_first_epoch(tmp_path):
    stopped(tmp_path, step=1)
    assert files(tmp_path) == {"config.yaml", "open_clip_config.json"}
    with pytest.raises(InputError, match=r"classifier\.json: no such file\. A run has it after its first epoch\."):
        evaluate_run(tmp_path)
    with pytest.raises(InputError, match=r"metrics\.json: no such file\. A run has it when it is complete"):
        read_metrics(tmp_path)


def test_stop_during_overwrite_leaves_a_run(tmp_path, monkeypatch):
    """metrics.json, which marks a run as complete, goes first; resume and overwrite accept what is left."""
    config = small(tmp_path, overwrite=True).resolved()
    checkpoint.save(tmp_path, weights_of(1), CLASSIFIER, {}, settings=config.identity(), rows=[], seconds=1.0)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    for name in ("metrics.json", "model.safetensors", "report.html", "metrics.jsonl"):
        (tmp_path / name).touch()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "delete", Mock(side_effect=KeyboardInterrupt))
        RunFolder(config).lock(config).__enter__()
    assert files(tmp_path) == {"config.yaml", "checkpoint", "model.safetensors", "report.html", "metrics.jsonl"}
    for how in ({"overwrite": False, "resume": tmp_path}, {"overwrite": True}):
        with RunFolder(dataclasses.replace(config, **how)).lock(config):
            assert "config.yaml" in files(tmp_path)
    assert files(tmp_path) == {"config.yaml"}


def test_run_without_a_complete_epoch_is_replaced(run, tmp_path):
    """Nothing is lost: such files are left if the loss of the first epoch is not finite."""
    folder, _ = run
    config = dataclasses.replace(TuneConfig.from_yaml(folder / "config.yaml", trust=True), out=tmp_path)
    for name in ("config.yaml", "open_clip_config.json"):  # not every method writes the second
        shutil.copy(folder / name, tmp_path)
        RunFolder(config)
    shutil.copy(folder / "metrics.jsonl", tmp_path)
    with pytest.raises(InputError, match="contains an earlier run"):
        RunFolder(config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_is_interrupt(tmp_path, number, capsys):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        arguments = ["--method", "skip", "--shots", "2", "--max-classes", "4", "--epochs", "2"]  # a step per epoch
        with at_step(2, lambda *args: signal.raise_signal(number)):
            assert main(["tune", *arguments, "--out", str(tmp_path / "my run")]) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    run = tmp_path / "my run"
    message = f"interrupted: 1 of 2 epochs are complete in {run}; continue it with skipkernels tune --resume '{run}'"
    assert " ".join(capsys.readouterr().err.split()).endswith(message)


def test_nohup_ignores_sighup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    work = "skipkernels.app.cli.doctor.DoctorCommand.execute"
    monkeypatch.setattr(work, lambda *_: signal.raise_signal(signal.SIGHUP) or 0)
    try:
        assert main(["doctor"]) == 0 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- numbers that are not finite -------------------------------------------------------------------------------------

NAN = {
    "loss": "the loss of batch 3 of epoch 2 is nan. Lower `text_lr`",
    "gradient": "after the last batch of epoch 2 weights are not finite",
}


@pytest.mark.parametrize(("of", "message"), NAN.items(), ids=NAN)
def test_nan_is_not_saved(of, message, tmp_path):
    def spoiled(self, inputs, labels):
        loss = self.clip(inputs, labels).loss
        loss.register_hook(lambda gradient: gradient * torch.nan)
        return StepOutput(torch.nan * loss if of == "loss" else loss, 5)

    with at_step(6, spoiled), pytest.raises(FloatingPointError, match=message):  # the last of the second epoch
        tune(small(tmp_path, max_classes=12))
    assert evaluate_run(tmp_path) == rows(tmp_path)[0]["accuracy"] and len(rows(tmp_path)) == 1


def test_infinite_logits_diverge(tmp_path, capsys):
    """Weights of 1e28 are finite, and so is the last loss, but the logits are not."""
    rates = ["--epochs", "2", "--warmup-epochs", "1", "--warmup-lr", "1e-4", "--text-lr", "1e30", "--image-lr", "1e30"]
    steps = ["--method", "skip", "--shots", "1", "--max-classes", "6", "--batch-size", "3"]
    assert main(["tune", *steps, *rates, "--out", str(tmp_path)]) == 1
    assert "logits of the test 'base' are not finite after this epoch" in capsys.readouterr().err
    assert evaluate_run(tmp_path) == rows(tmp_path)[0]["accuracy"] and len(rows(tmp_path)) == 1


@pytest.mark.usefixtures("compared")
def test_infinite_logits_of_pretrained_weights(tmp_path, capsys):
    weights = {name: tensor * 1e30 for name, tensor in pictogram_tiny.state_dict().items()}
    save_file(weights, tmp_path / "large.safetensors")
    arguments = [*ARGUMENTS, "--pretrained", tmp_path / "large.safetensors", "--out", tmp_path / "run"]
    assert "embeddings of texts are not finite" in fails(arguments, capsys)
    assert main([*map(str, arguments), "--method", "zero-shot"]) == 1
    message = "logits of the test 'base' are not finite for the pretrained weights. Check --pretrained"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "function", "files"),
    [
        (writing, "save", "predictions.safetensors, predictions.csv, report.html were"),
        (writing, "prediction_lines", "predictions.csv, report.html were"),
        (run_page, "report_html", "report.html was"),
    ],
    ids=["predictions", "table", "report"],
)
def test_report_failure_is_note(run, tmp_path, monkeypatch, module, function, files):
    def fail(*_):
        assert not (tmp_path / "metrics.json").exists(), "the metrics, which complete a run, are written last"
        raise MemoryError("too much")

    monkeypatch.setattr(module, function, fail)
    console = Console(record=True, file=io.StringIO(), width=200)
    metrics = tune(small(tmp_path), console)
    assert metrics["tuned"] == run[1]["tuned"] and json.loads((tmp_path / "metrics.json").read_text()) == metrics
    note = metrics["notes"][-1]
    assert note == f"{files} not written (MemoryError: too much)." and note in console.export_text()
    assert not (tmp_path / "report.html").exists()


# ---- memory and disk -----------------------------------------------------------------------------------------------


def test_out_of_memory_in_step(tmp_path, capsys):
    with at_step(2, lambda *args: torch.empty(2**60)):
        message = fails([*ARGUMENTS, "--out", tmp_path / "run"], capsys)
    assert "out of memory" in message and "--memory min" in message
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("skipkernels: can't allocate memory for a tensor (…)\nand where"),
        torch.OutOfMemoryError("HIP out of memory"),
    ],
    ids=repr,
)
def test_error_of_memory_is_translated(error, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "execute", Mock(side_effect=error))
    with pytest.raises(MemoryError, match=r"^tune: out of memory \([^\n]+\)\. Use `memory=min`"):
        tune(small(tmp_path))


@pytest.mark.parametrize("error", [RuntimeError(), MemoryError("gather: too large")], ids=repr)
def test_other_errors_are_not_translated(error, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "execute", Mock(side_effect=error))
    with pytest.raises(type(error)) as caught:
        tune(small(tmp_path))
    assert caught.value is error


@pytest.fixture
def small_disk():
    """Limit the size of files, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_last_epoch(tmp_path, small_disk):
    """The weights of LoRA are written; the state of AdamW, twice as large, is not."""

    def fill(self, inputs, labels):
        small_disk(3 * sum(tensor.nbytes for tensor in self.state_dict().values()) // 2)
        return StepOutput(self.clip(inputs, labels).loss, 5)

    changes = {"method": "lora", "max_classes": 4}  # two epochs of a step
    message = "the checkpoint can't be written to .*: File too large.* continue with `resume=RUN`"
    with at_step(2, fill, LoRA), pytest.raises(InputError, match=message):
        tune(small(tmp_path, **changes))
    small_disk(resource.RLIM_INFINITY)
    assert not (tmp_path / "metrics.json").exists(), "the run is not marked complete"
    assert evaluate_run(tmp_path) == rows(tmp_path)[0]["accuracy"] and len(rows(tmp_path)) == 1
    assert tune(resume=tmp_path)["epochs"] == 2


def test_run_folder_refuses_second_process(tmp_path, capsys):
    with locked(tmp_path):
        assert "in use by" in fails([*ARGUMENTS, "--out", tmp_path], capsys)


# ---- terminals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_closed_terminal_does_not_stop_run(tmp_path, terminal):
    """The reader of a pipe (`| head -1`) or the terminal of a background process is gone after the first output."""
    torch.set_num_threads(1)  # a forked process has no other threads
    reader, writer = pty.openpty() if terminal else os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        arguments = ["--shots", "2", "--max-classes", "4", "--epochs", "1"]
        os._exit(main(["tune", *arguments, "--out", str(tmp_path / "run")]))
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    assert os.waitpid(child, 0)[1] == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "complete"
    assert (tmp_path / "run" / "report.html").exists()
