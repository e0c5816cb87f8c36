"""Notes on settings and warnings about results."""

from __future__ import annotations

import dataclasses
import json

import pytest

from skipkernels.app.cli.main import main
from skipkernels.app.results import notes
from tests.app.runs import SMALL, shortened


@pytest.mark.parametrize(
    ("before", "after", "method", "expected"),
    [
        (40.0, 40.0, "skip", None),
        (40.0, 39.0, "skip", "39.00 %, below zero-shot (40.00 %). Lower --text-lr and --image-lr"),
        (40.0, 20.0, "coop", "Lower --text-lr, or"),
        (None, None, "skip", None),
        (5.0, None, "skip", None),
        (5.0, 1.0, "zero-shot", None),  # is not trained
    ],
)
def test_below_zero_shot(before, after, method, expected):
    metrics = {"classes": {"base": 10}, "zero_shot": {"base": before}, "tuned": {"base": after}}
    found = notes.below_zero_shot(SMALL.with_method(method).resolved(), metrics)
    assert found is None if expected is None else expected in found and "\n" not in found


@pytest.mark.parametrize(
    ("validation", "test", "images", "warns"),
    [
        (55.4, 18.3, 60, True),
        (55.4, 50.0, 60, False),  # less than ten points
        (60.0, 40.0, 20, False),  # less than three standard errors
        (None, 18.3, 60, False),
        (55.4, None, 60, False),
    ],
)
def test_optimistic_validation(validation, test, images, warns):
    metrics = {"classes": {"base": 10}, "images": {"tests": {"base": images}}, "tuned": {"base": test}}
    found = notes.optimistic_validation(metrics | {"validation": {"images": images, "tuned": validation}})
    assert (found is not None) == warns
    assert not warns or "on the validation images is 55.40 %, far above 18.30 %" in found
    assert notes.optimistic_validation(metrics | {"validation": None}) is None


def test_tune_below_zero_shot_warns(tmp_path, capsys):
    rates = ["--text-lr", "1", "--image-lr", "1", "--epochs", "1", "--warmup-epochs", "0"]
    with shortened():
        assert main(["tune", "--method", "skip", "--max-classes", "12", *rates, "--out", str(tmp_path)]) == 0
    (note,) = json.loads((tmp_path / "metrics.json").read_text())["notes"]
    assert "below zero-shot" in note and "Lower --text-lr and --image-lr" in note
    assert f"warning: {note}" in " ".join(capsys.readouterr().err.split())
    for name in ("report.html", "README.md"):
        page = (tmp_path / name).read_text()
        assert "below zero-shot" in page and "pictogram-tiny is a small model for demonstrations" in page


@pytest.mark.parametrize(
    ("method", "skip_layers", "expected"),
    [
        ("skip", 1, "one block"),
        ("skip", 1.0, "every block"),
        ("auto", 1.0, "every block"),
        ("skip", 0.5, None),
        ("skip", 2, None),
    ],
)
def test_setting_notes_of_skip_layers(method, skip_layers, expected):
    said = " ".join(notes.setting_notes(dataclasses.replace(SMALL, method=method, skip_layers=skip_layers)))
    assert said == "" if expected is None else f"--skip-layers {skip_layers} skips {expected} of each tower" in said
