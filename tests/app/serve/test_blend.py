"""Blends of tuned and zero-shot weights."""

from __future__ import annotations

import contextlib
import io
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
from skipkernels.app.train.model import load_model
from skipkernels.app.train.setup import build_task
from tests.app.runs import fails

ALPHA = 0.25000001  # more digits than tables show


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


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


def test_weights(run, blended):
    tuned, found = load_file(run.folder / "model.safetensors"), load_file(blended / "model.safetensors")
    zero_shot = load_model("pictogram-tiny", None, torch.device("cpu"))[0].state_dict()
    assert found.keys() == tuned.keys() == zero_shot.keys()
    for name, before in zero_shot.items():
        expected = (0.75 * before.double() + 0.25 * tuned[name].double()).float()
        torch.testing.assert_close(found[name], expected, atol=1e-7, rtol=1e-6)  # a rounding


def test_curve_goes_from_zero_shot_to_tuned(run, blended):
    curve = metrics_of(blended)["blend"]
    assert curve["alphas"] == sorted([ALPHA, *(n / 10 for n in range(11))]) and curve["chosen"] == ALPHA
    for name, values in curve["accuracy"].items():
        assert (values[0], values[-1]) == (run.metrics["zero_shot"][name], run.metrics["tuned"][name])


def test_blend_is_a_run(run, blended, images):
    assert evaluate_run(blended) == metrics_of(blended)["tuned"]
    classifier = sk.Classifier.load(blended, device="cpu")
    assert classifier.classes == run.classes
    name = "pictogram-tiny by Skip Tuning, blended at 0.25"
    assert repr(classifier) == f"Classifier({len(run.classes)} classes, {name}, not calibrated, cpu)"
    assert not torch.equal(classifier.logits(images), sk.Classifier.load(run.folder, device="cpu").logits(images))
    with pytest.raises(InputError, match=r"contains an earlier run; .*or use `overwrite=True`\.$"):
        sk.blend(run.folder, out=blended)


def test_predictions_are_those_of_the_blend(run, blended):
    """Also those before tuning, which are those of the run."""
    before = {test.name: test for test in predictions.load(run.folder / PREDICTIONS)}
    for test in predictions.load(blended / PREDICTIONS):
        correct = (test.tuned.classes[:, 0] == test.labels).float().mean().item()
        assert 100 * correct == pytest.approx(metrics_of(blended)["tuned"][test.name], abs=1e-3)
        assert test.zero_shot.classes.equal(before[test.name].zero_shot.classes)


def test_page_and_card_name_the_blend(run, blended):
    metrics, page = metrics_of(blended), (blended / "report.html").read_text()
    assert "Skip Tuning, blended at 0.25 · " in page and "On the 20 trained classes, the accuracy went from " in page
    assert "alpha; accuracy, %" in page
    assert metrics["command"].endswith(f"\nskipkernels blend {run.folder} --alpha {ALPHA} --out {blended}")
    assert metrics["validation"] is None, "all images trained"
    assert f"\nskipkernels blend RUN --alpha {ALPHA}\n```" in (blended / "README.md").read_text()
    assert main(["report", str(blended)]) == 0 and (blended / "report.html").read_text() == page


@pytest.fixture(scope="module")
def with_validation(run, tmp_path_factory) -> Path:
    """Folder of a run on photos, a part of which were held out to choose the epoch; its blend is in run-blend."""
    folder = tmp_path_factory.mktemp("validation")
    for number, (image, label) in enumerate(run.task.train):
        for copy in range(3):
            path = folder / "data" / run.classes[label] / f"{number}-{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.rotate(4 * copy).save(path)
    options = ["--data", f"imagefolder:{folder / 'data'}", "--shots", "2", "--epochs", "1", "--device", "cpu"]
    assert main(["tune", "--method", "skip", *options, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def chosen(with_validation) -> Path:
    """Folder of the blend of `with_validation`, with a chosen alpha; printed.txt is what the command printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["blend", str(with_validation)]) == 0
    folder = with_validation.with_name("run-blend")
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


def test_alpha_is_the_best_on_the_validation_images(chosen):
    metrics = metrics_of(chosen)
    accuracies = metrics["blend"]["accuracy"]["validation"]
    assert metrics["blend"]["chosen"] == accuracies.index(max(accuracies)) / 10
    assert metrics["validation"]["tuned"] == max(accuracies)
    assert ", the best on the validation images" in (chosen / "printed.txt").read_text()


@pytest.mark.parametrize("folder", ["with_validation", "chosen"])
def test_calibration_is_fitted_to_the_validation_images(folder, request):
    """They are the same images for a run and for its blend."""
    run = request.getfixturevalue(folder)
    held_out = build_task(TuneConfig.from_yaml(run / "config.yaml")).validation.images
    classifier = sk.Classifier.load(run, device="cpu")
    logits = classifier.logits(torch.stack([classifier.transform(image) for image, _ in held_out]))
    temperature = fit_temperature(logits, torch.tensor(held_out.labels))
    assert classifier.temperature == pytest.approx(temperature, rel=1e-3)  # logits in batches of another size
    assert classifier.none_logit == pytest.approx(fit_none_logit(logits, classifier.temperature), rel=1e-3)


def test_blend_of_a_method_without_tuned_weights_is_refused(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("method: zero-shot")
    assert "RUN must be of a method that tunes the weights" in fails(["blend", tmp_path], capsys)
