"""Runs that stop early, and the files they leave."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from skipkernels.app.cli.main import main
from skipkernels.app.data import InputError
from skipkernels.app.demo import glyph_tiny, glyphs
from skipkernels.app.methods.base import StepOutput
from skipkernels.app.methods.skip import Skip
from skipkernels.app.train import check, checkpoint, evaluate_run, tune
from skipkernels.app.train import run as run_module
from skipkernels.app.train.run import _memory_errors
from skipkernels.app.train.run_folder import RunFolder
from skipkernels.app.train.setup import build_task
from tests.app.train.runs import fails, files, rows, small
from tests.app.train.test_checkpoint import CLASSIFIER, Epoch
from tests.streams import Broken

ARGUMENTS = ["tune", "--shots", "4", "--classes", "12"]


@pytest.fixture
def at_step(monkeypatch):
    """Replace a step, counted from 1, by a function."""

    def let(number: int, happen) -> None:
        step, calls = Skip.step, iter(range(1, 1000))

        def other(self, inputs, labels):
            return happen(self, inputs, labels) if next(calls) == number else step(self, inputs, labels)

        monkeypatch.setattr(Skip, "step", other)

    return let


def interrupt(*args, **named):
    raise KeyboardInterrupt


def not_a_number(self, inputs, labels):
    return StepOutput(self.clip(inputs, labels).loss * torch.tensor(float("nan")), 5)


def test_interrupt_keeps_last_epoch(tmp_path, at_step, capsys):
    at_step(10, interrupt)  # in the second epoch of six steps
    with pytest.raises(KeyboardInterrupt, match="1 of 2 epochs are complete in .*; `resume=True` continues it"):
        tune(small(tmp_path))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["status"], metrics["epochs"], metrics["steps"]) == ("interrupted", 1, 6)
    assert evaluate_run(tmp_path) == metrics["tuned"]
    assert "interrupted after 1 epoch" in (tmp_path / "report.html").read_text()
    assert main(["eval", str(tmp_path)]) == 0
    note = f"the run was interrupted with 1 epoch left; resume it with skipkernels tune --resume {tmp_path}"
    assert note in capsys.readouterr().err


def test_interrupt_before_first_epoch(tmp_path, at_step):
    at_step(1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune(small(tmp_path))
    assert files(tmp_path) == {"config.yaml", "metrics.json", "open_clip_config.json"}
    with pytest.raises(InputError, match=r"classifier\.json: no such file\. A run has it after its first epoch\."):
        evaluate_run(tmp_path)


class Killed(BaseException):
    """Stands in for SIGKILL."""


@pytest.mark.parametrize("moment", range(1, 41, 3))
def test_kill_during_overwrite_leaves_run(run, tmp_path, monkeypatch, moment):
    """The remaining files are accepted by resume and overwrite."""
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "events.out.tfevents.1").touch()
    config = small(tmp_path, overwrite=True).resolved()
    known = {"settings": config.identity(), "rows": [], "seconds": 1.0}
    checkpoint.save(tmp_path, Epoch(1), CLASSIFIER, {}, **known)
    calls = itertools.count(1)

    def until_killed(work):
        def until(*args, **named):
            if next(calls) >= moment:
                raise Killed  # and in all later calls: a killed process does not clean up
            return work(*args, **named)

        return until

    folder = RunFolder(config)
    with monkeypatch.context() as patched:
        for name in ("replace", "rename", "rmdir", "unlink"):
            patched.setattr(os, name, until_killed(getattr(os, name)))
        with pytest.raises(Killed), folder.lock():
            raise Killed
    for how in ({"overwrite": False, "resume": True}, {"overwrite": True}):
        with RunFolder(dataclasses.replace(config, **how)).lock():
            assert "config.yaml" in files(tmp_path)
    if moment == 40:
        assert next(calls) < moment, "all moments were tested"


def test_sigterm_is_interrupt(tmp_path, at_step):
    at_step(1, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main([*ARGUMENTS, "--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("log_every", [1, 4])
def test_nan_loss_names_batch(tmp_path, at_step, log_every):
    seen = []

    def bad(self, inputs, labels):
        seen.append(labels.tolist())
        return not_a_number(self, inputs, labels)

    at_step(9, bad)
    with pytest.raises(FloatingPointError, match="the loss of batch 3 of epoch 2 is nan") as error:
        tune(small(tmp_path, log_every=log_every))
    task = build_task(small(tmp_path).resolved())
    images, names = re.search(r"training images ([\d, ]+) of (.*)\. Lower", str(error.value)).groups()
    labels = [task.train[int(image)][1] for image in images.split(", ")]
    assert labels == seen[0], "the message names the images of the step"
    assert names == ", ".join(dict.fromkeys(task.tests[0].classes[label] for label in labels))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["status"] == "diverged" and metrics["epochs"] == 1 and len(rows(tmp_path)) == 1
    assert evaluate_run(tmp_path) == metrics["tuned"] == rows(tmp_path)[0]["accuracy"]


def test_nan_weights_are_not_saved(tmp_path, at_step):
    def spoil(self, inputs, labels):
        loss = self.clip(inputs, labels).loss
        loss.register_hook(lambda gradient: gradient * float("nan"))
        return StepOutput(loss, 5)

    at_step(12, spoil)
    with pytest.raises(FloatingPointError, match="after the last batch of epoch 2 weights are not finite"):
        tune(small(tmp_path))
    assert evaluate_run(tmp_path) == rows(tmp_path)[0]["accuracy"]


def test_infinite_logits_diverge(tmp_path, capsys):
    """Weights of 1e28 are finite, and so is the last loss, but the logits are not."""
    rates = ["--epochs", "2", "--warmup-epochs", "1", "--warmup-lr", "1e-4", "--text-lr", "1e30", "--image-lr", "1e30"]
    steps = ["--shots", "1", "--classes", "6", "--batch-size", "3"]
    assert main(["tune", *steps, *rates, "--out", str(tmp_path)]) == 1
    assert "logits of the test 'base' are not finite after this epoch" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["status"] == "diverged" and metrics["epochs"] == 1
    assert evaluate_run(tmp_path) == metrics["tuned"]


def test_infinite_logits_of_pretrained_weights(tmp_path, capsys):
    weights = {name: tensor * 1e30 for name, tensor in glyph_tiny.state_dict().items()}
    save_file(weights, tmp_path / "large.safetensors")
    arguments = [*ARGUMENTS, "--pretrained", tmp_path / "large.safetensors", "--out", tmp_path / "run"]
    assert "embeddings of texts are not finite" in fails(arguments, capsys)
    assert main([*map(str, arguments), "--method", "zero-shot"]) == 1
    message = "logits of the test 'base' are not finite for the pretrained weights. Check --pretrained"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ---- report -------------------------------------------------------------------------------------------------------


def test_report_failure_is_note(run, tmp_path, monkeypatch):
    def fail(*_):
        assert json.loads((tmp_path / "metrics.json").read_text())["status"] == "complete", "metrics are written first"
        raise MemoryError("too much")

    monkeypatch.setattr(run_module, "report_html", fail)
    console = Console(record=True, file=io.StringIO(), width=200)
    metrics = tune(small(tmp_path), console)
    assert metrics["tuned"] == run[1]["tuned"] and json.loads((tmp_path / "metrics.json").read_text()) == metrics
    note = metrics["notes"][-1]
    assert note == "report.html was not written (MemoryError: too much)." and note in console.export_text()
    assert not (tmp_path / "report.html").exists()


def test_interrupt_during_report(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "report_html", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"the run in {tmp_path} is complete; report.html is not written"):
        tune(small(tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("changes", [{}, {"method": "lora", "preset": "reference"}], ids=["skip", "lora"])
def test_check_opens_data_once(tmp_path, monkeypatch, changes):
    opened, open_glyphs = [], glyphs.open_glyphs
    monkeypatch.setattr(glyphs, "open_glyphs", lambda *args, **how: opened.append(args) or open_glyphs(*args, **how))
    check(small(tmp_path / "run", epochs=None, **changes))
    assert len(opened) == 1


# ---- memory and disk -----------------------------------------------------------------------------------------------


def test_out_of_memory_in_step(tmp_path, at_step, capsys):
    at_step(2, lambda *args: torch.empty(2**60))
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
def test_memory_errors_translates(error):
    with pytest.raises(MemoryError, match=r'^tune: out of memory \([^\n]+\) Use memory="min"'), _memory_errors():
        raise error


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError("no"), MemoryError("gather: too large")], ids=repr)
def test_memory_errors_passes_other_errors(error):
    with pytest.raises(type(error)) as caught, _memory_errors():
        raise error
    assert caught.value is error


@pytest.fixture
def small_disk():
    """Limit the size of files, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The changed weights have three megabytes, and the state of AdamW six.
@pytest.mark.parametrize(
    ("size", "changes"),
    [(20 << 20, {}), (5 << 20, {"optimizer": "AdamW", "delta": True}), (100, {})],
    ids=["the weights", "the state", "all"],
)
def test_full_disk_keeps_last_epoch(tmp_path, at_step, small_disk, size, changes):
    def fill(self, inputs, labels):
        small_disk(size)
        return StepOutput(self.clip(inputs, labels).loss, 5)

    at_step(9, fill)
    with pytest.raises(InputError, match="the checkpoint can't be written.* continue with `resume=True`"):
        tune(small(tmp_path, **changes))
    small_disk(resource.RLIM_INFINITY)
    assert not (tmp_path / "metrics.json").exists(), "the run is not marked complete"
    assert evaluate_run(tmp_path) == rows(tmp_path)[0]["accuracy"] and len(rows(tmp_path)) == 1
    assert tune(small(tmp_path, resume=True, **changes))["epochs"] == 2


def test_run_folder_refuses_second_process(tmp_path, capsys):
    from skipkernels.folders import locked

    with locked(tmp_path):
        assert "in use by" in fails([*ARGUMENTS, "--out", tmp_path], capsys)


# ---- terminals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True], ids=["log", "live"])
def test_broken_terminal_does_not_stop_run(tmp_path, monkeypatch, live):
    monkeypatch.setattr(threading, "excepthook", lambda args: pytest.fail(f"a thread ended with {args.exc_value!r}"))
    console = Console(file=Broken(), force_terminal=live)
    assert tune(small(tmp_path, epochs=1), console)["status"] == "complete"
    assert not console.quiet


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_closed_terminal_does_not_stop_run(tmp_path, terminal):
    """The reader of a pipe (`| head -1`) or the terminal of a background process is gone after the first output."""
    reader, writer = pty.openpty() if terminal else os.pipe()
    command = [sys.executable, "-m", "skipkernels", *ARGUMENTS, "--epochs", "1", "--out", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=writer, stderr=writer, start_new_session=True) as process:
        os.close(writer)
        assert os.read(reader, 1)
        os.close(reader)
    assert process.returncode == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "complete"
    assert (tmp_path / "run" / "report.html").exists()


def test_sighup_is_interrupt(tmp_path, at_step):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, as the next test checks
    at_step(1, lambda *args: signal.raise_signal(signal.SIGHUP))
    try:
        assert main([*ARGUMENTS, "--out", str(tmp_path / "run")]) == 128 + signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["status"] == "interrupted"


def test_sighup_ignored_by_nohup(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(
            "skipkernels.app.cli.doctor.DoctorCommand.execute", lambda *_: signal.raise_signal(signal.SIGHUP) or 0
        )
        assert main(["doctor"]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_interrupt_names_complete_epochs(tmp_path, at_step, monkeypatch, capsys):
    at_step(10, interrupt)
    monkeypatch.setattr(RunFolder, "publish", interrupt)
    out = tmp_path / "run"
    assert main([*ARGUMENTS, "--epochs", "2", "--out", str(out)]) == 130
    left = f"interrupted: 1 of 2 epochs are complete in {out}; --resume continues it"
    assert " ".join(capsys.readouterr().err.split()).endswith(left)


def test_interrupt_of_resumed_run_names_complete_epochs(tmp_path, at_step, monkeypatch):
    at_step(10, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tune(small(tmp_path))
    monkeypatch.setattr("skipkernels.app.train.evaluation.Evaluator.evaluate", interrupt)
    with pytest.raises(KeyboardInterrupt, match="1 of 2 epochs are complete"):
        tune(small(tmp_path, resume=True))
