"""Cross-validation: its folds, and the results over all of them."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics

import pytest
from rich.console import Console

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import DatasetImages, InputError, Source, from_datasets
from skipkernels.app.data.splits import fold_numbers, fold_source
from skipkernels.app.studies.folds import cross_validate
from skipkernels.app.train import evaluate_run

PICTOGRAMS = TuneConfig(data="pictograms:food", max_classes=6, method="zero-shot", device="cpu")


def source(counts: list[int]) -> Source:
    items = [("", label) for label, count in enumerate(counts) for _ in range(count)]
    images = DatasetImages(items, names=[str(number) for number in range(len(items))])
    return from_datasets("own", train=images, classes=[f"class {label}" for label in range(len(counts))])


def test_fold_numbers_are_stratified_and_depend_on_names():
    labels, names = [0] * 11 + [1] * 7 + [2] * 3, [f"{number}.png" for number in range(21)]
    found = fold_numbers(labels, names, folds=5, seed=0)
    for part in (range(21), range(11), range(11, 18), range(18, 21)):
        sizes = [sum(found[index] == fold for index in part) for fold in range(1, 6)]
        assert max(sizes) - min(sizes) <= 1
    assert fold_numbers(labels[::-1], names[::-1], folds=5, seed=0) == found[::-1]
    assert fold_numbers(labels, names, folds=5, seed=1) != found


def test_fold_source_tests_every_image_once():
    parts = [fold_source(source([4, 2]), f"{number}/3", seed=0) for number in (1, 2, 3)]
    tested = [name for part in parts for name in part.images("test").names]
    assert sorted(tested) == list("012345")
    for part in parts:
        assert not set(part.images("test").names) & set(part.images("train").names)
        assert set(part.images("train").labels) == {0, 1} and not part.has_split("val")
    assert "classes have fewer than 3 images, so not every fold tests them: class 1 (2)" in parts[0].notes[1]


@pytest.mark.parametrize(
    ("counts", "fold", "message"),
    [
        ([3, 1], "1/2", "needs two images, one to train while the other is tested; own has too few of class 1"),
        ([3, 2], "1/6", "has 5 images; 6 folds need one each"),
        ([3, 2], "0/2", "must be such as 2/5"),
        ([3, 2], "3", "must be such as 2/5"),
    ],
)
def test_fold_source_bad_fold(counts, fold, message):
    with pytest.raises(InputError, match=message):
        fold_source(source(counts), fold, seed=0)


@pytest.mark.parametrize(
    "changes", [{"protocol": "base-to-new"}, {"test": "none"}, {"fold": "5/4"}], ids=lambda changes: next(iter(changes))
)
def test_config_bad_fold(changes):
    with pytest.raises(InputError, match="fold"):
        dataclasses.replace(PICTOGRAMS, **{"fold": "1/3"} | changes).resolved()


def test_cross_validate(tmp_path, in_process):
    study = cross_validate(PICTOGRAMS, 3, tmp_path, Console(quiet=True))
    study.write(tmp_path)
    pooled = json.loads((tmp_path / "metrics.json").read_text())
    with open(tmp_path / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["image"] for row in rows}) == pooled["images"] == 18
    assert [row["fold"] for row in rows] == ["1"] * 6 + ["2"] * 6 + ["3"] * 6
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert pooled["tuned"]["accuracy"] == round(100 * right / 18, 4)
    of_folds = [result.metrics["tuned"]["all"] for result in study.results]
    expected = pytest.approx([statistics.fmean(of_folds), statistics.stdev(of_folds)])
    assert pooled["tuned"]["over_folds"] == expected
    assert [each["images"] for each in pooled["tuned"]["classes"]] == [3] * 6
    assert evaluate_run(tmp_path / study.results[1].folder) == study.results[1].metrics["tuned"]
    page = (tmp_path / "report.html").read_text()
    assert "mean ± standard deviation" in page
    assert main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").read_text() == page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--folds", "1"], "--folds must be at least 2; got 1"),
        (["--folds", "3", "--fold", "1/3"], "--folds are all folds, and fold is one"),
        (["--folds", "3", "--resume"], "leave --resume out"),
    ],
    ids=" ".join,
)
def test_folds_command_bad_options(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not list(tmp_path.iterdir())


def test_folds_of_the_default_are_continued(tmp_path, capsys, in_process):
    """Complete runs, each of which chose settings of its own, are kept; the others are resumed."""
    arguments = ["tune", "--folds", "2", "--data", "pictograms:food", "--max-classes", "4", "--epochs", "0"]
    arguments += ["--device", "cpu", "--out", str(tmp_path)]
    assert main(arguments) == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.json")}
    assert main(arguments) == 0, capsys.readouterr().err
    assert len(written) == 2 and {path: path.stat().st_mtime_ns for path in written} == written
