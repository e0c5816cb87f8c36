"""Contents of report.html: sentences, tables, galleries and plots, with dashes for missing values; made again."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest
import torch

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.report.run_page import run_report
from skipkernels.app.report.table import change_cell
from skipkernels.app.results.class_metrics import metrics_of_test
from skipkernels.app.results.predictions import TestPredictions, TopClasses
from tests.app.report.pages import assert_complete, metrics, page, predicted, row, top
from tests.app.report.parsed import Page, text_of


def test_report_contents():
    found = Page(page())
    assert "pictogram-tiny on pictograms · Skip Tuning · all training images · 2026-11-26" in found.text
    assert (
        "On the 20 trained classes, the accuracy went from 57.5 % to 81.5 % (95 % interval 62.1–92.2). On the 19 new "
        "classes, the accuracy went from 47.9 % to 40.2 %."
    ) in found.text
    for cells in (
        ["accuracy, %", "images", "zero-shot", "tuned", "change"],
        ["20 trained classes", "24", "57.5 (38.1–74.9)", "81.5 (62.1–92.2)", "+24.0"],
        ["19 new classes", "", "47.9", "40.2", "−7.7"],
        ["harmonic mean", "", "52.3", "53.9", "+1.6"],
        ["alpha", "2", "0.0", "50.0", "+50.0", "100.0", "66.7", "beta (1)"],
        ["beta", "2", "100.0", "50.0", "−50.0", "50.0", "50.0", "gamma (1)"],
        ["run", "1,234.5 s"],
        ["step", "25.12 ms"],
        ["kept classes per step", "11.5 of 20"],
        ["trained parameters", "847,616 of 6,427,201"],
        ["checkpoint", "24.5 MiB"],
        ["device", "cpu, fp32"],
        ["data", "pictograms; base-to-new; 80 training images, 24 images of trained classes"],
        ["seed", "0"],
        ["versions", "torch 2.13.0"],
    ):
        assert cells in found.rows, cells
    assert "skipkernels tune --shots 4" in found.text and "data: pictograms" in found.text
    sections = [section.get("id") for section in found.root.iter("section")]
    assert sections == ["fixed", "broken", "classes", "training", "reproduce", "cost"], "cost is last"


def candidate(name: str, accuracy: float, balanced: float, new_names: bool = True, chosen: bool = False) -> dict:
    found = {"name": name, "accuracy": accuracy, "balanced_accuracy": balanced, "images": 40, "loss": 1.25}
    return found | {"new_names": new_names, "chosen": chosen}


def always_cat(cats: int, dogs: int) -> dict:
    """Metrics of a model that always answers "cat"."""
    labels, top = torch.tensor([0] * cats + [1] * dogs), TopClasses(torch.zeros(8, 1).long(), torch.ones(8, 1))
    by_class = {"all": metrics_of_test(labels, top, ["cat", "dog"])}
    accuracy = {"zero_shot": {"all": 0.0}, "tuned": {"all": 100.0 * cats / 8}, "classes": {"all": 2}}
    return accuracy | {
        "by_class": by_class,
        "zero_shot_by_class": by_class,
        "images": {"train": 8, "tests": {"all": 8}},
    }


HELD = {"images": 40, "zero_shot": 50.0, "tuned": 62.5, "thresholds": []}
NO_TEST = {
    "zero_shot": {"all": None},
    "tuned": {"all": None},
    "classes": {"all": 20},
    "images": {"train": 8, "tests": {"all": 0}},
}
KEPT = {"wanted": "coverage", "target": 95.0, "threshold": 0.72, "coverage": 81.25, "accuracy": 95.0}
UNREACHED = {"wanted": "accuracy", "target": 99.0, "threshold": None, "coverage": None, "accuracy": None}


class Shown(NamedTuple):
    """Changes of metrics, and what a page of them without epochs and predictions shows."""

    changes: dict
    text: str = ""
    rows: tuple[list[str], ...] = ()
    absent: str = ""


CANDIDATES = ["accuracy, %", "loss", "takes new names"]
SHOWN = {
    "no test images": Shown(
        NO_TEST | {"validation": HELD, "best_epoch": 2},
        "On the 40 validation images, the accuracy went from 50.0 % to 62.5 % (95 % interval 47.0–75.8). They chose "
        "the epoch. No images were kept for a test: expect less on others.",
        (["validation images", "40", "50.0 (35.2–64.8)", "62.5 (47.0–75.8)", "+12.5"],),
    ),
    "no test images, and nothing to choose": Shown(
        NO_TEST | {"validation": HELD},
        "62.5 % (95 % interval 47.0–75.8). No images were kept for a test.",
        absent="expect less",
    ),
    "candidates of two accuracies": Shown(
        {
            "candidates": [candidate("zero-shot", 50.0, 50.0), candidate("probe ×3", 62.5, 60.0, False, True)],
            "chosen_because": "highest accuracy on 40 held-out images",
            "classifier": "probe ×3",
            "validation": HELD,
        },
        "Probe ×3 was chosen: highest accuracy on 40 held-out images. Then it was trained again, on all images.",
        (
            ["2 candidates, on 40 held-out images", "accuracy, %", "balanced accuracy, %", "loss", "takes new names"],
            ["zero-shot", "50.0 (35.2–64.8)", "50.0", "1.2500", "yes"],
            ["✓ probe ×3", "62.5 (47.0–75.8)", "60.0", "1.2500", "no"],
            ["validation images, before they train", "40", "50.0 (35.2–64.8)", "62.5 (47.0–75.8)", "+12.5"],
        ),
    ),
    "classifier in the title": Shown({"classifier": "probe ×3"}, "pictograms · Probe ×3 · all training images"),
    "a blend of the chosen candidate": Shown(
        {"candidates": [candidate("probe", 62.5, 60.0, chosen=True)], "classifier": "probe, blended at 0.5"},
        "Probe was chosen. Then it was trained again, on all images.",
    ),
    "candidates of one accuracy": Shown(
        {"candidates": [candidate("zero-shot", 50.0, 50.0, chosen=True)], "classifier": "zero-shot"},
        "Zero-shot was chosen.",
        (["1 candidate, on 40 held-out images", *CANDIDATES], ["✓ zero-shot", "50.0 (35.2–64.8)", "1.2500", "yes"]),
        absent="trained again",
    ),
    "candidates without a test": Shown(
        NO_TEST | {"validation": HELD, "candidates": [candidate("probe", 62.5, 60.0, chosen=True)]},
        "They chose the candidate, and then trained. No images were kept for a test",
        absent="the epoch",
    ),
    "many candidates": Shown(
        {"candidates": [candidate(str(n), 50.0 + n, 50.0 + n, chosen=n == 1) for n in range(7)]},
        "All 7 candidates",
        (
            ["the best 5 of 7 candidates, on 40 held-out images", *CANDIDATES],
            ["7 candidates, on 40 held-out images", *CANDIDATES],
        ),
    ),
    "no images but those that train": Shown(
        NO_TEST, "All images trained, none were kept for a test: there is no accuracy.", absent="went from"
    ),
    "no candidates": Shown({"candidates": [], "chosen_because": None}, absent="candidates"),
    "no thresholds": Shown({"validation": HELD}, absent="Thresholds"),
    "thresholds": Shown(
        {"validation": {"images": 80, "zero_shot": 60.0, "tuned": 80.0, "thresholds": [KEPT, UNREACHED]}},
        "Measured on 80 validation images.",
        (["95 % kept", "0.72", "81.2", "95.0"], ["99 % right", "–", "–", "–"]),
    ),
    "classes of one size": Shown(
        always_cat(4, 4),
        "the accuracy went from 0.0 % to 50.0 % (95 % interval 21.5–78.5)",
        (["2 trained classes", "8", "0.0 (0.0–32.4)", "50.0 (21.5–78.5)", "+50.0"],),
        absent="balanced",
    ),
    "classes of different size": Shown(
        always_cat(6, 2),
        "the accuracy went from 0.0 % to 75.0 % (95 % interval 40.9–92.9) and the balanced accuracy went from 50.0 % "
        "to 50.0 %.",
        (
            ["2 trained classes, balanced", "", "50.0", "50.0", "+0.0"],
            ["2 trained classes", "8", "0.0 (0.0–32.4)", "75.0 (40.9–92.9)", "+75.0"],
        ),
    ),
}


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN)
def test_report_shows(shown):
    text = page(shown.changes, rows=[], tests=[])
    assert_complete(text)
    found = Page(text)
    assert shown.text in found.text
    for cells in shown.rows:
        assert cells in found.rows, cells
    assert not shown.absent or shown.absent not in found.text.partition("All settings")[0]


@pytest.mark.parametrize(
    ("change", "text", "style"),
    [(0.05001, "+0.1", "better"), (-0.06, "−0.1", "worse"), (-0.04, "+0.0", ""), (0.04, "+0.0", ""), (None, "–", "")],
)
def test_change_that_is_rounded_to_zero_has_no_sign_and_no_colour(change, text, style):
    cell = change_cell(change)
    assert (cell.text, cell.style) == (text, style)


def test_command_prints_the_tables_of_the_report(tmp_path, capsys, monkeypatch):
    candidates = {"candidates": [candidate("probe", 62.5, 60.0, chosen=True)], "chosen_because": "of its accuracy"}
    candidates |= {"classifier": "probe"}
    found = metrics(**always_cat(6, 2) | candidates | {"best_epoch": 2, "validation": HELD})
    (tmp_path / "config.yaml").write_text(TuneConfig(method="skip", device="cpu", out=tmp_path).resolved().to_yaml())
    monkeypatch.setattr("skipkernels.app.train.tune", lambda *_: found)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["tune", "--method", "skip", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "1 candidate, on 40 held-out images",
        "✓ probe",
        "62.5 (47.0–75.8)",
        "60.0",
        "1,234.5 s",
        "cpu, fp32",
        "Probe was chosen: of its accuracy.",
        "Epoch 2 of 2 is kept, the best on 40 validation images by accuracy.",
        "2 trained classes, balanced",
    ):
        assert text in printed  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, ""),
        ({"data": "pictograms", "train_on_validation": True}, ""),
        ({"train_on_validation": True}, ", and any validation images"),
        ({"train_on_validation": True, "validation": "none"}, ""),
    ],
)
def test_report_title_has_the_number_of_training_images(changes, more):
    config = TuneConfig(**{"data": "imagefolder:photos", "method": "skip", "shots": 16} | changes)
    title = f"pictogram-tiny on {config.data} · Skip Tuning · at most 16 images of each class{more} · "
    assert title in Page(page(config=config)).text


def test_report_galleries_show_top_classes_and_shape():
    found = Page(page(tests=[predicted()]))
    fixed, broken = found.section("fixed"), found.section("broken")
    assert [text_of(when) for when in fixed.iter("dt")] == ["zero-shot ✗", "tuned ✓"]
    assert [text_of(when) for when in broken.iter("dt")] == ["zero-shot ✓", "tuned ✗"]
    zero_shot, tuned = [["beta", "50 %"], ["gamma", "50 %"]], [["alpha true class", "88 %"], ["beta", "12 %"]]
    assert [[text_of(part) for part in each] for each in fixed.iter("dd")] == [*zero_shot, *tuned]
    assert [each.get("class") for each in fixed.iter("dd")] == [None, None, "correct", None]
    assert len(list(fixed.iter("img"))) == 1


def test_report_many_classes():
    labels = torch.arange(250).repeat_interleave(2)
    after = torch.where(torch.arange(500) % 3 == 0, labels, (labels + 1) % 250)
    test = TestPredictions(
        "all", [f"c{i}" for i in range(250)], labels, top(*[0] * 500), top(*after.tolist()), [""] * 500
    )
    found = Page(page({"classes": {"all": 250}, "zero_shot": {"all": 1.0}, "tuned": {"all": 2.0}}, tests=[test]))
    rows = found.section("classes").findall(".//tbody/tr")
    assert [text_of(row[0]) for row in rows] == test.classes and {len(row) for row in rows} == {8}


def test_report_plots():
    """Each line goes over the whole width, and from the bottom to the top if it has the lowest and highest value."""
    blend = {"alphas": [0.0, 0.5, 1.0], "accuracy": {"base": [57.5, 75.0, 81.5], "new": [48, None, 40]}, "chosen": 0.5}
    text = page({"blend": blend, "best_epoch": 2, "validation": HELD}, [row(1, validation=50.0), row(2)])
    found = Page(text)
    loss, accuracy = found.root.iter("svg")
    points = [[line.get("points") for line in plot.iter("polyline")] for plot in (loss, accuracy)]
    assert points[0] == ["260.0,0.0 520.0,230.0 520.0,230.0"]
    base, new, validation = points[1]  # from 40, of new classes, to 62, of trained ones in the second epoch
    assert base == "0.0,47.0 260.0,10.5 520.0,0.0 520.0,0.0" and new.endswith("260.0,230.0 520.0,230.0 520.0,230.0")
    assert validation == "260.0,125.5 260.0,125.5", "a dot"
    assert [each.text for each in accuracy.iter("text")] == ["62", "51", "40", "0", "epoch 2"]
    assert "Epoch 2 of 2 is kept, the best on 40 validation images by accuracy." in found.text
    assert ["0.5", "75.0", "–"] in found.rows, "of the blend"
    assert "● trained classes ● new classes ● validation images" in found.text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, None),
        ({"blend": 0.5}, ", before its blend"),
        ({"head": "anchored"}, ", before its head"),
        ({"head": "anchored", "blend": 0.5}, ", before its blend and its head"),
    ],
)
def test_report_says_what_epochs_lack(changes, text):
    config = TuneConfig(method="skip", **changes)
    found = Page(page({"best_epoch": 2, "validation": HELD}, [row(1), row(2)], config=config)).text
    assert (f"Epochs are those of the trained model{text}." in found) == (text is not None)
    assert f"Epoch 2 of 2 is kept, the best on 40 validation images by accuracy{text or ''}." in found


def test_report_method_without_epochs():
    cost = metrics()["cost"] | {"seconds_per_epoch": None, "milliseconds_per_step": None}
    tuned, new = {"base": 60.0, "new": None}, predicted("new")
    new.tuned = None
    changes = {"tuned": tuned, "epochs": 0, "kept_classes": None, "cost": cost}
    text = page(changes, rows=[], tests=[predicted(), new])
    found = Page(text)
    assert found.root.find(".//svg") is None
    for cells in (
        ["19 new classes", "", "47.9", "–", "–"],
        ["harmonic mean", "", "52.3", "–", "–"],
        ["alpha", "2", "0.0", "–", "–", "–", "0.0", "beta (2)"],
    ):
        assert cells in found.rows, cells
    assert not [cells for cells in found.rows if cells[0].startswith(("epoch", "kept classes"))]
    assert_complete(text)


def test_report_without_mistakes_has_no_galleries():
    perfect = TestPredictions("base", ["a", "b"], torch.tensor([0, 1]), top(0, 1), top(0, 1), ["x", "y"])
    found = Page(page(tests=[perfect]))
    assert found.section("fixed") is None and found.root.find(".//img") is None


def test_report_incomplete_rows():
    bare = {"epoch": 1, "loss": float("nan"), "accuracy": {"base": 60.0, "new": None, "harmonic": float("nan")}}
    tuned, unknown = bare["accuracy"] | {"base": float("nan")}, predicted()
    unknown.tuned.probabilities[:] = torch.nan
    text = page({"tuned": tuned}, [bare, bare | {"epoch": 2, "loss": None}], tests=[unknown])
    assert len(list(Page(text).root.iter("svg"))) == 1, "only accuracy"
    assert_complete(text)


def test_report_command_repeats_the_page(run, tmp_path, capsys):
    folder, _ = run
    expected = (folder / "report.html").read_text()
    assert run_report(folder) == expected
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").read_text() == expected
    found = Page(expected)
    assert found.root.find(".//img") is not None
    assert "skipkernels tune --shots 2 --max-classes 24 --method skip --epochs 2" in found.text
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "metrics.json"):
        shutil.copy(folder / name, tmp_path / "run")
    assert "skipkernels tune" in run_report(tmp_path / "run"), "without predictions and rows"
    assert main(["report", str(tmp_path)]) == 2
    assert "has no results. Name the folder of a run" in capsys.readouterr().err
