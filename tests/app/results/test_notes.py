"""Notes on settings and warnings about results."""

from __future__ import annotations

import dataclasses
import json

import pytest

from skipkernels.app.cli.main import main
from skipkernels.app.results import notes
from tests.app.runs import SMALL


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
    found = notes.result_notes(SMALL.with_method(method).resolved(), metrics)
    assert found == [] if expected is None else expected in found[0] and "\n" not in found[0]


def test_tune_below_zero_shot_warns(tmp_path, capsys):
    rates = ["--text-lr", "1", "--image-lr", "1", "--epochs", "1", "--warmup-epochs", "0"]
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
