"""Whole runs: results, reproducibility, options, loggers and precision."""

from __future__ import annotations

import contextlib
import io
import json
import re
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data.base import InputError
from skipkernels.app.methods.skip import Skip
from skipkernels.app.train import evaluate_run, trainer, tune
from tests.app.runs import files, losses, results, rows, small

FILES = {"config.yaml", "metrics.json", "metrics.jsonl", "model.safetensors", "report.html", "predictions.csv"}
FILES |= {"classifier.json", "open_clip_config.json", "README.md", "predictions.safetensors"}


def test_tune_files_and_metrics(run):
    folder, metrics = run
    assert files(folder) == FILES
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert [row["epoch"] for row in rows(folder)] == [1, 2]
    assert rows(folder)[-1]["accuracy"] == metrics["tuned"]
    assert metrics["status"] == "complete" and metrics["steps"] == 12 and metrics["protocol"] == "base-to-new"
    assert metrics["classes"] == {"base": 12, "new": 12} and set(metrics["tuned"]) == {"base", "new", "harmonic"}
    assert metrics["kept_classes"] == 7  # six kept, and one of six in the tail
    assert metrics["cost"]["peak_memory_mib"] > metrics["cost"]["baseline_memory_mib"] * 0.5 > 50
    html = (folder / "report.html").read_text()
    assert "<svg" in html and "data:image/png" in html and not re.search(r"""(src|href)=["']?(https?:|//)""", html), (
        "the report is self-contained"
    )


@pytest.fixture
def graphed_steps(monkeypatch) -> list[int]:
    """Sizes of the batches of graphed steps, which are made as on a GPU; on the CPU such a step is the plain loop."""
    sizes, make = [], Skip.graphed

    def graphed(self, *arguments):
        step = make(self, *arguments)
        return lambda inputs, labels: sizes.append(len(labels)) or step(inputs, labels)

    monkeypatch.setattr(trainer, "_captures", lambda device: True)
    monkeypatch.setattr(Skip, "graphed", graphed)
    return sizes


def test_tune_graphed_gives_the_same_results(run, tmp_path, graphed_steps):
    tune(small(tmp_path))
    assert results(tmp_path)[1:] == results(run[0])[1:]
    assert graphed_steps == [4] * 12


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [({"graph": False}, []), ({"precision": "fp16"}, ["the gradient scaler"])],
    ids=["graph", "fp16"],
)
def test_tune_without_graph(tmp_path, graphed_steps, changes, reasons):
    """Only a step that was to be captured has a note."""
    console = Console(file=io.StringIO())
    tune(small(tmp_path, epochs=1, max_classes=4, **changes), console)
    printed = " ".join(console.file.getvalue().split())
    assert not graphed_steps
    assert re.findall("note: steps run without a CUDA graph: (the gradient scaler)?", printed) == reasons


def test_tune_beats_zero_shot_on_drawings_of_another_designer(tmp_path):
    rates = {"text_lr": 3e-4, "image_lr": 3e-4, "optimizer": "adamw", "batch_size": 16}
    data = {"data": "pictograms:objects", "max_classes": 100, "shots": 8}
    metrics = tune(TuneConfig(**data, method="skip", **rates, epochs=3, device="cpu", out=tmp_path))
    zero_shot, tuned = metrics["zero_shot"], metrics["tuned"]
    assert zero_shot["base"] > 20, "25 times chance over 131 classes"
    assert tuned["base"] > zero_shot["base"] + 8
    assert tuned["harmonic"] > zero_shot["harmonic"] + 2
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]


def test_eval_reproduces_accuracy(run, capsys):
    folder, metrics = run
    assert evaluate_run(folder) == metrics["tuned"]
    assert main(["eval", str(folder)]) == 0
    printed = capsys.readouterr().out.split()
    assert all(printed[printed.index(name) + 2] == f"{value:.2f}" for name, value in metrics["tuned"].items())


def test_tune_is_deterministic(run, tmp_path, monkeypatch):
    folder, _ = run
    torch.manual_seed(7)  # the caller's generator has no effect
    expected = torch.rand(1)
    torch.manual_seed(7)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", Mock(side_effect=AssertionError("seeds every GPU")))
    tune(small(tmp_path / "again"))
    assert torch.rand(1) == expected, "the caller's generator is restored"
    assert results(tmp_path / "again") == results(folder)
    tune(small(tmp_path / "other", seed=1, epochs=1))
    assert losses(tmp_path / "other")[0] != losses(folder)[0]


@pytest.mark.parametrize(
    "changes",
    [{"skip_layers": 0, "max_classes": 2}, {"skip_layers": 1.0, "max_classes": 3, "protocol": "few-shot"},
     {"tail": "fixed", "memory": "min", "sampler": "random", "batch_size": 5,
      "optimizer": "adamw", "text_lr": 1e-4, "image_lr": 1e-4, "template": ("a sign of a {}.", "{}"),
      "max_classes": 6},
     {"protocol": "cross-dataset", "max_classes": 6}],
    ids=["no cut", "all skipped, few-shot", "several", "cross-dataset"],
)  # fmt: skip
def test_tune_options(tmp_path, changes):
    metrics = tune(small(tmp_path, **{"epochs": 1, **changes}))
    assert metrics["status"] == "complete"
    assert evaluate_run(tmp_path) == metrics["tuned"]


@pytest.mark.parametrize("method", ["zero-shot", "linear-probe"])
def test_tune_methods_without_steps(run, tmp_path, method):
    metrics = tune(small(tmp_path, method=method, epochs=None))
    assert metrics["zero_shot"] == run[1]["zero_shot"], "the pretrained model"
    assert evaluate_run(tmp_path) == metrics["tuned"] and (metrics["epochs"], metrics["steps"]) == (0, 0)
    if method == "linear-probe":
        assert metrics["tuned"]["new"] is metrics["tuned"]["harmonic"] is None, "a linear probe uses no texts"
        assert metrics["tuned"]["base"] > 50 and metrics["parameters"]["trained"] == 12 * (128 + 1)
    else:
        assert metrics["tuned"] == metrics["zero_shot"] and metrics["parameters"]["trained"] == 0
    assert files(tmp_path) >= {"report.html", "metrics.json"}


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [({"epochs": 1, "max_classes": 4}, [1]), ({"method": "zero-shot", "epochs": None}, []), ({"data": "csv:none"}, [])],
    ids=["epochs", "no epochs", "error"],
)
def test_loggers_get_each_epoch_and_are_closed(tmp_path, caplog, settings, epochs):
    mine = Mock()
    with caplog.at_level("INFO", "skipkernels"), contextlib.suppress(InputError):
        tune(small(tmp_path, **settings), loggers=[mine])
    assert [call.args[0]["epoch"] for call in mine.write.call_args_list] == epochs
    assert ("epoch 1/1: loss" in caplog.text) == bool(epochs)
    mine.close.assert_called_once_with()


# ---- precision ------------------------------------------------------------------------------------------------------


def test_bf16_keeps_accuracy(run, tmp_path):
    folder, _ = run
    metrics = tune(small(tmp_path, epochs=1, precision="bf16"))
    assert losses(tmp_path) == pytest.approx(losses(folder)[:1], rel=0.1)
    expected = rows(folder)[0]["accuracy"]["base"]
    assert metrics["tuned"]["base"] == pytest.approx(expected, abs=9)  # one of 12 images, 8.3 %, may change
    assert evaluate_run(tmp_path) == metrics["tuned"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_does_not_synchronize(tmp_path, monkeypatch, precision):
    step, steps = trainer.Trainer._step, []

    def watched(self, *args):
        steps.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")  # the first compiles kernels
        try:
            return step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Trainer, "_step", watched)
    tune(small(tmp_path, epochs=1, device="cuda", precision=precision))
    assert len(steps) == 6
