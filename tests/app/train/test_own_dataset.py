"""`tune` and `evaluate_run` on a dataset that is passed in Python; classes of different size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

import skipkernels
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.train import evaluate_run, tune
from skipkernels.app.train.checkpoint import best_epoch
from skipkernels.app.train.reading import how_to_resume
from skipkernels.clip import SkipCLIP
from skipkernels.features import CacheError
from tests.app.data.pictures import Listed
from tests.app.runs import fails, files, rows

COLOURS = ["black", "red", "white"]


def squares(labels: Sequence[int]) -> Listed:
    """Squares of three colours."""
    return Listed(labels, lambda label: Image.new("RGB", (40, 32), COLOURS[label]), labels=list(labels))


def in_turn(count: int, *, shift: int = 0) -> Listed:
    """Squares of each colour in turn."""
    return squares([(number + shift) % 3 for number in range(count)])


SETTINGS = {"method": "skip", "classes": [f"{c} square" for c in COLOURS], "epochs": 2, "device": "cpu", "shots": "all"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, skipkernels.tune(dataset=in_turn(30), validation=0.25, out=folder, **SETTINGS)


def test_tune_dataset(run):
    folder, metrics = run
    config = TuneConfig.from_yaml(folder / "config.yaml")
    assert (config.data, config.shots, config.validation) == ("dataset:Listed", "all", 0.25)
    assert metrics["protocol"] == "few-shot" and metrics["classes"] == {"all": 3}
    assert metrics["validation"]["images"] == 6 and metrics["best_epoch"] in (1, 2)  # of seven images each
    assert {"report.html", "model.safetensors"} <= files(folder)
    assert evaluate_run(str(folder), dataset=in_turn(30), classes=SETTINGS["classes"]) == metrics["tuned"]


def test_evaluate_run_refuses_a_setting_without_effect(tmp_path):
    with pytest.raises(TypeError, match="^evaluate_run: settings must be among device, .*; got epochs.$"):
        evaluate_run(tmp_path, device="cpu", epochs=3)


def test_epochs_of_weighted_classes_are_chosen_by_balanced_accuracy(tmp_path):
    """Among twenty black validation images, one red and one white, each class counts as much as another."""
    held = squares([0] * 20 + [1, 2])
    options = SETTINGS | {"epochs": 3, "class_weight": "balanced"}
    metrics = tune(dataset=in_turn(21), validation=held, test=in_turn(3), out=tmp_path, **options)
    found = rows(tmp_path)
    assert metrics["best_epoch"] == max((row["validation_balanced"], row["epoch"]) for row in found)[1]
    recalls = [each["recall"] for each in metrics["by_class"]["validation"]["classes"]]
    assert metrics["by_class"]["validation"]["balanced_accuracy"] == pytest.approx(sum(recalls) / 3, abs=1e-3)
    first, second = {"validation": 90.0, "validation_balanced": 40.0}, {"validation": 80.0, "validation_balanced": 60.0}
    assert best_epoch([{"epoch": 1} | first, {"epoch": 2} | second]) == 2


@pytest.fixture
def trained(monkeypatch) -> list[tuple[SkipCLIP, int]]:
    """Model and label of each image of each step."""
    found, forward = [], SkipCLIP.forward

    def recorded(clip, x, y, **options):
        found.extend((clip, label) for label in y.tolist())
        return forward(clip, x, y, **options)

    monkeypatch.setattr(SkipCLIP, "forward", recorded)
    return found


UNEQUAL = [0] * 12 + [1] * 6 + [2] * 3  # labels of squares
FOUR_EPOCHS = SETTINGS | {"validation": "none", "epochs": 4}


@pytest.mark.parametrize(
    ("class_weight", "weights"),
    [
        ("balanced", [21 / 36, 21 / 18, 21 / 9]),
        (0.5, [21 / (18 + 6 * 2**0.5) * each for each in (1, 2**0.5, 2)]),
    ],
)
def test_rare_classes_weigh_more(class_weight, weights, trained, tmp_path):
    tune(dataset=squares(UNEQUAL), test=in_turn(3), out=tmp_path, class_weight=class_weight, **FOUR_EPOCHS)
    assert sorted(label for _, label in trained) == sorted(4 * UNEQUAL)
    assert trained[0][0].class_weight.tolist() == pytest.approx(weights)


def test_rare_classes_are_drawn_as_often(trained, tmp_path):
    tune(dataset=squares(UNEQUAL), test=in_turn(3), out=tmp_path, sampler="balanced", **FOUR_EPOCHS)
    counts = torch.tensor([label for _, label in trained]).bincount()
    assert (counts - 28).abs().max() < 4 * (84 * 2 / 9) ** 0.5, "four standard deviations of 84 draws"


def test_resume_with_the_same_dataset(run):
    folder, metrics = run
    again = {"validation": 0.25, "resume": folder, **SETTINGS}
    assert json.dumps(tune(dataset=in_turn(30), **again)) == json.dumps(metrics)
    with pytest.raises(InputError, match="dataset_identity is '.*' in the run in"):
        tune(dataset=in_turn(30, shift=1), **again)
    for change in ({"identity": "version 2"}, {"classes": ["coal", "fire", "snow"]}):
        with pytest.raises(InputError, match="dataset_identity is '.*' in the run in"):
            tune(dataset=in_turn(30), **again | change)


def test_a_dataset_passed_in_python_is_resumed_in_python():
    assert how_to_resume(Path("my run"), "dataset:Photos") == "tune(dataset=…, resume='my run')"


@pytest.mark.parametrize("data", ["imagefolder:squares", "pictograms"])
def test_evaluate_a_run_of_other_data_on_a_dataset(run, data, tmp_path):
    """All of its classes are tested, whatever `max_classes` the run had."""
    folder, _ = run
    of_other = shutil.copytree(folder, tmp_path / "run")
    config = (of_other / "config.yaml").read_text()
    changed = config.replace("dataset:Listed", data).replace("max_classes: null", "max_classes: 2")
    (of_other / "config.yaml").write_text(changed)
    given = {"dataset": in_turn(30), "test": in_turn(30), "classes": SETTINGS["classes"]}
    assert "max_classes: 2" in changed and evaluate_run(of_other, **given) == evaluate_run(folder, **given)


def test_eval_of_dataset(run, capsys):
    assert "was passed to tune in Python. Pass it again as" in fails(["eval", run[0]], capsys)


def test_identity_of_a_dataset_with_a_lambda(tmp_path):
    """It identifies the images also in a feature cache."""
    parts = {"dataset": in_turn(6), "test": in_turn(3)}
    parts["dataset"].transform = lambda image: image
    options = SETTINGS | {"epochs": 1, "validation": "none", "cache": tmp_path / "cache", "out": tmp_path / "run"}
    with pytest.raises(CacheError, match="cannot be compared with another one. Pass `identity`"):
        tune(**parts, **options)
    assert tune(**parts, identity="version 1", **options)["status"] == "complete"


def test_tune_hugging_face_dataset(tmp_path):
    hub = pytest.importorskip("datasets")
    labels = [number % 2 for number in range(12)]
    rows = {"image": [Image.new("L", (40, 32), 200 * label) for label in labels], "label": labels}
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["black", "white"])})
    metrics = tune(dataset=hub.Dataset.from_dict(rows, features=features), method="zero-shot", out=tmp_path)
    assert metrics["classes"] == {"all": 2} and metrics["status"] == "complete"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dataset": iter([])}, "dataset must be a map-style dataset, with len"),
     ({"dataset": {"train": in_turn(3)}}, "dataset must be a map-style dataset, .* got dict"),
     ({"dataset": in_turn(3), "data": "coop:dtd"}, "data must be left out with dataset; got 'coop:dtd'"),
     ({"test": in_turn(3)}, "dataset must be given with test, validation or classes"),
     ({"classes": 3}, "dataset must be given with .* For a number of classes pass max_classes"),
     ({"dataset": in_turn(30)}, "has no class names"),
     ({"dataset": in_turn(30), "classes": ["one", "two"]}, "dataset:Listed: labels must be from 0 to 1"),
     ({"dataset": in_turn(3), "classes": COLOURS}, "classes black, red, white have 1 image, .* or train on")],
)  # fmt: skip
def test_tune_refuses(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        tune(**{"device": "cpu", "out": tmp_path} | arguments)
    assert not files(tmp_path)
