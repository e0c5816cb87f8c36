"""Whole runs: results, options, and data with and without a test."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError, pictograms
from skipkernels.app.train import checkpoint, evaluate_run, tune
from skipkernels.app.train.evaluation import Evaluator
from skipkernels.app.train.run import Run
from tests.app.data.pictures import make_folders
from tests.app.runs import fails, files, losses, results, rows, small

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


def test_tune_beats_zero_shot_on_drawings_of_another_designer(tmp_path):
    rates = {"text_lr": 3e-4, "image_lr": 3e-4, "optimizer": "adamw", "batch_size": 16}
    data = {"data": "pictograms:objects", "max_classes": 100, "shots": 8}
    metrics = tune(TuneConfig(**data, method="skip", **rates, epochs=3, device="cpu", out=tmp_path))
    zero_shot, tuned = metrics["zero_shot"], metrics["tuned"]
    assert zero_shot["base"] > 20, "25 times chance over 131 classes"
    assert tuned["base"] > zero_shot["base"] + 8
    assert tuned["harmonic"] > zero_shot["harmonic"] + 2
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0]


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    """The last of those with equal validation accuracies."""
    accuracies, evaluate = [50.0, 70.0, 70.0, 60.0], Evaluator.evaluate
    saved, save = [], checkpoint.save

    def evaluated(self, method, *pretrained):
        return evaluate(self, method, *pretrained)._replace(validation=accuracies[min(len(saved), 3)])

    def recorded(run, weights, *others, **named):
        saved.append({name: tensor.clone() for name, tensor in weights.items()})
        save(run, weights, *others, **named)

    monkeypatch.setattr(Evaluator, "evaluate", evaluated)
    monkeypatch.setattr(checkpoint, "save", recorded)
    metrics, kept = tune(small(tmp_path, validation=0.5, epochs=4, shots=1)), load_file(tmp_path / "model.safetensors")
    assert metrics["best_epoch"] == 3 and metrics["epochs"] == 4 and metrics["validation"]["images"] == 12
    assert all(kept[name].equal(saved[2][name]) for name in kept)
    assert not all(kept[name].equal(saved[3][name]) for name in kept)
    assert metrics["tuned"] == rows(tmp_path)[2]["accuracy"]


# ---- options ---------------------------------------------------------------------------------------------------------


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


def without_steps(folder: Path, method: str) -> dict:
    metrics = tune(small(folder, method=method, epochs=None))
    assert evaluate_run(folder) == metrics["tuned"] and (metrics["epochs"], metrics["steps"]) == (0, 0)
    assert files(folder) >= {"report.html", "metrics.json"}
    return metrics


def test_tune_zero_shot(run, tmp_path):
    metrics = without_steps(tmp_path, "zero-shot")
    assert metrics["tuned"] == metrics["zero_shot"] == run[1]["zero_shot"], "the pretrained model"
    assert metrics["parameters"]["trained"] == 0


def test_tune_linear_probe(run, tmp_path):
    metrics = without_steps(tmp_path, "linear-probe")
    assert metrics["zero_shot"] == run[1]["zero_shot"], "the pretrained model"
    assert metrics["tuned"]["new"] is metrics["tuned"]["harmonic"] is None, "a linear probe uses no texts"
    assert metrics["tuned"]["base"] > 50 and metrics["parameters"]["trained"] == 12 * (128 + 1)


def test_bf16_keeps_accuracy(run, tmp_path):
    folder, _ = run
    metrics = tune(small(tmp_path, epochs=1, precision="bf16"))
    assert losses(tmp_path) == pytest.approx(losses(folder)[:1], rel=0.1)
    expected = rows(folder)[0]["accuracy"]["base"]
    assert metrics["tuned"]["base"] == pytest.approx(expected, abs=9)  # one of 12 images, 8.3 %, may change
    assert evaluate_run(tmp_path) == metrics["tuned"]


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


def test_overwrite_replaces_run_of_other_version(run, tmp_path):
    config = (run[0] / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("max_keep:", "most_kept:"))
    assert (
        main(["tune", "--shots", "1", "--max-classes", "6", "--epochs", "1", "--overwrite", "--out", str(tmp_path)])
        == 0
    )
    assert "max_keep" in (tmp_path / "config.yaml").read_text()


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"method": "lora", "preset": "reference"}], ids=["skip", "lora"])
def test_tune_opens_data_once(tmp_path, monkeypatch, changes):
    opened, open_now = [], pictograms.open_pictograms
    monkeypatch.setattr(
        pictograms, "open_pictograms", lambda *args, **how: opened.append(args) or open_now(*args, **how)
    )
    monkeypatch.setattr(Run, "execute", lambda self: {})
    tune(small(tmp_path / "run", epochs=None, **changes))
    assert len(opened) == 1


@pytest.mark.parametrize(("count", "validation"), [(5, "auto"), (1, "none")])
def test_tune_without_test(tmp_path, capsys, count, validation):
    data, out = make_folders(tmp_path / "photos", dict.fromkeys(("cat", "dog", "ox"), count)), tmp_path / "run"
    options = f"--method skip --test none --shots all --validation {validation} --epochs 1 --device cpu".split()
    assert main(["tune", "--data", f"imagefolder:{data}", *options, "--out", str(out)]) == 0
    output, metrics = capsys.readouterr(), json.loads((out / "metrics.json").read_text())
    assert "For your own images use a pretrained model: --model ViT-B-16-quickgelu" in output.err
    held = 3 if validation == "auto" else 0
    assert metrics["images"] == {"train": 3 * count - held, "tests": {"all": 0}}
    assert metrics["zero_shot"] == metrics["tuned"] == {"all": None}
    assert (metrics["validation"] or {"images": 0})["images"] == held
    assert ("validation" in output.out) == (held > 0)
    headline = "On the 3 validation images, the accuracy went from" if held else "there is no accuracy"
    assert headline in (out / "report.html").read_text() and headline in (out / "README.md").read_text()
    assert main(["predict", str(out), str(data), "--device", "cpu"]) == 0
    assert main(["blend", str(out), "--device", "cpu"]) == 0
    assert "--data must be given: all images of imagefolder:" in fails(["eval", out], capsys)


def test_eval_of_other_data_has_all_its_classes(tmp_path, capsys):
    data = f"imagefolder:{make_folders(tmp_path / 'photos', dict.fromkeys(('cat', 'dog', 'ox'), 4))}"
    other = f"imagefolder:{make_folders(tmp_path / 'other', dict.fromkeys('abcdefg', 3))}"
    out = str(tmp_path / "run")
    assert main(["tune", "--method", "zero-shot", "--data", data, "--max-classes", "2", "--out", out]) == 0
    capsys.readouterr()
    for arguments, shown in [
        ([], "all: 2 images of 2 classes: cat, dog"),
        (["--data", other], "all: 7 images of 7 classes: a, b, c, d, e and 2 more"),
        (["--data", other, "--max-classes", "3"], "all: 3 images of 3 classes: a, c, e"),
    ]:
        assert main(["eval", out, *arguments]) == 0
        error = capsys.readouterr().err
        assert shown in error and "split by a hash of their names" in error and "train too" not in error
