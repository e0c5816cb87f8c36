"""Blends of tuned and zero-shot weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import skipkernels as sk
from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.methods.skip import Skip
from skipkernels.app.results import predictions
from skipkernels.app.results.files import PREDICTIONS
from skipkernels.app.train import evaluate_run
from skipkernels.app.train.calibration import fit_none_logit, fit_temperature
from skipkernels.app.train.interpolation import Interpolation
from skipkernels.app.train.model import load_model
from skipkernels.app.train.setup import build_run

ALPHA = 0.25000001  # more digits than tables show


@pytest.fixture(scope="module")
def blended(run, tmp_path_factory) -> Path:
    """Folder of a blend that encoded no image below the cut: the features are in the run's cache."""

    def encode_frozen(self, images):
        raise AssertionError

    folder = tmp_path_factory.mktemp("blend") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Skip, "encode_frozen", encode_frozen)
        assert main(["blend", str(run.folder), "--alpha", str(ALPHA), "--out", str(folder)]) == 0
    return folder


def test_weights_and_curve(run, blended):
    tuned, found = load_file(run.folder / "model.safetensors"), load_file(blended / "model.safetensors")
    zero_shot = load_model("pictogram-tiny", None, torch.device("cpu"))[0].state_dict()
    assert found.keys() == tuned.keys() == zero_shot.keys()
    for name, before in zero_shot.items():
        expected = (0.75 * before.double() + 0.25 * tuned[name].double()).float()
        torch.testing.assert_close(found[name], expected, atol=1e-7, rtol=1e-6)  # a rounding
    curve = json.loads((blended / "metrics.json").read_text())["blend"]
    assert curve["alphas"] == sorted([ALPHA, *(n / 10 for n in range(11))]) and curve["chosen"] == ALPHA
    for name, values in curve["accuracy"].items():
        assert (values[0], values[-1]) == (run.metrics["zero_shot"][name], run.metrics["tuned"][name])


def test_ends_are_exact():
    before, after = torch.tensor([1e8, 1.0]), torch.tensor([-0.1, 0.3])
    weight = before.clone()
    between = Interpolation([weight])
    weight.copy_(after)
    between.end()
    for alpha, expected in ((0.0, before), (1.0, after), (0.5, (before + after) / 2)):
        between.set(alpha)
        assert weight.equal(expected)


def test_blend_is_a_run(run, blended, images):
    assert evaluate_run(blended) == json.loads((blended / "metrics.json").read_text())["tuned"]
    classifier = sk.Classifier.load(blended, device="cpu")
    assert classifier.classes == run.classes
    name = "pictogram-tiny by Skip Tuning, blended at 0.25"
    assert repr(classifier) == f"Classifier({len(run.classes)} classes, {name}, not calibrated, cpu)"
    assert not torch.equal(classifier.logits(images), sk.Classifier.load(run.folder, device="cpu").logits(images))
    with pytest.raises(InputError, match=r"contains an earlier run; .*or use `overwrite=True`\.$"):
        sk.blend(run.folder, out=blended)


def test_report(run, blended):
    metrics, page = json.loads((blended / "metrics.json").read_text()), (blended / "report.html").read_text()
    before = {test.name: test for test in predictions.load(run.folder / PREDICTIONS)}
    for test in predictions.load(blended / PREDICTIONS):
        correct = (test.tuned.classes[:, 0] == test.labels).float().mean().item()
        assert 100 * correct == pytest.approx(metrics["tuned"][test.name], abs=1e-3)
        assert test.zero_shot.classes.equal(before[test.name].zero_shot.classes)
    assert "Skip Tuning, blended at 0.25 · " in page and "On the 20 trained classes, the accuracy went from " in page
    assert "alpha; accuracy, %" in page
    assert metrics["command"].endswith(f"\nskipkernels blend {run.folder} --alpha {ALPHA} --out {blended}")
    assert metrics["validation"] is None, "all images trained"
    assert f"\nskipkernels blend RUN --alpha {ALPHA}\n```" in (blended / "README.md").read_text()
    assert main(["report", str(blended)]) == 0 and (blended / "report.html").read_text() == page


def test_tune_chooses_alpha_and_temperature_on_validation_images(run, tmp_path, capsys):
    images = run.task.train
    for number, (image, label) in enumerate(images):
        for copy in range(3):
            folder = tmp_path / "data" / run.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            image.rotate(4 * copy).save(folder / f"{number}-{copy}.png")
    options = ["--data", f"imagefolder:{tmp_path / 'data'}", "--shots", "2", "--epochs", "1", "--device", "cpu"]
    arguments = ["tune", "--method", "skip", *options, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert main(["blend", str(tmp_path / "run")]) == 0
    assert ", the best on the validation images" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run-blend" / "metrics.json").read_text())
    curve = metrics["blend"]
    held_out = curve["accuracy"]["validation"]
    assert curve["chosen"] == held_out.index(max(held_out)) / 10
    assert metrics["validation"]["tuned"] == max(held_out)

    setup = build_run(TuneConfig.from_yaml(tmp_path / "run" / "config.yaml"))  # for its images
    held = setup.task.validation.images
    inputs = torch.stack([held[n][0] for n in range(len(held))])
    for name in ("run", "run-blend"):
        classifier = sk.Classifier.load(tmp_path / name, device="cpu")
        fitted = fit_temperature(classifier.logits(inputs), torch.tensor(held.labels))
        assert classifier.temperature == pytest.approx(fitted, rel=1e-3)  # logits in batches of another size
        none_logit = fit_none_logit(classifier.logits(inputs), classifier.temperature)
        assert classifier.none_logit == pytest.approx(none_logit, rel=1e-3)

    zero_shot = str(tmp_path / "zero-shot")
    assert main(["tune", "--method", "zero-shot", "--max-classes", "4", "--device", "cpu", "--out", zero_shot]) == 0
    assert main(["blend", zero_shot]) == 2
    assert "RUN must be of a method that tunes the weights" in " ".join(capsys.readouterr().err.split())


def test_temperature_is_the_minimum():
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(200, 5, generator=generator)
    labels = torch.where(torch.rand(200, generator=generator) < 0.7, logits.argmax(1), 0)
    best = fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        return torch.nn.functional.cross_entropy(logits.double() / temperature, labels, label_smoothing=2 / 202).item()

    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.99, 1.01, 2))
    all_correct = fit_temperature(logits, logits.argmax(1))
    assert 0.01 < all_correct < best  # not certain, however many are correct
    assert fit_temperature(logits[:, :1], torch.zeros(200, dtype=torch.int64)) == 1
