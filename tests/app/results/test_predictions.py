"""Predictions of a run: their file, their CSV, and the metrics by class."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest
import torch

from skipkernels.app.data import InputError
from skipkernels.app.results import predictions
from skipkernels.app.results.class_metrics import class_metrics, metrics_of_test, most_frequent_errors
from skipkernels.app.results.files import PREDICTIONS
from skipkernels.app.results.predictions import TestPredictions, TopClasses
from skipkernels.formatting import csv_text
from tests.app.report.pages import NASTY, predicted


def values(test: TestPredictions) -> tuple:
    """All that predictions hold; of the classes of each image, ids and probabilities."""
    tops = [top and [part.tolist() for part in top] for top in (test.zero_shot, test.tuned)]
    return test.name, test.classes, test.images, test.thumbnails, test.labels.tolist(), tops


def test_predictions_round_trip_and_damage(tmp_path):
    path, tests = tmp_path / PREDICTIONS, [predicted(NASTY, "caf\udce9"), predicted("new")]
    tests[1].tuned = None
    predictions.save(path, tests)
    assert [values(test) for test in predictions.load(path)] == [values(test) for test in tests]
    data = path.read_bytes()
    for damaged in (
        data[:-9],
        data[: len(data) // 2],
        b"",
        data.replace(b'format":"2', b'format":"3'),
        data.replace(b"beta", b"bet\\"),  # in the JSON of the metadata
        data[:-1] + bytes([data[-1] ^ 1]),  # a bit of the last probability
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            predictions.load(path)


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_their_definitions(seed):
    rng = torch.Generator().manual_seed(seed)
    labels, predicted = torch.randint(0, 6, (40,), generator=rng), torch.randint(0, 8, (40,), generator=rng)
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    names, there = [f"class {n}" for n in range(9)], sorted(set(labels.tolist()))  # some have no images
    found = class_metrics(labels, predicted, names)
    assert [each.name for each in found] == [names[label] for label in there]
    for label, each in zip(there, found, strict=True):
        of, taken_for = (sum(n for pair, n in pairs.items() if pair[side] == label) for side in (0, 1))
        recall, precision = (pairs[label, label] / n if n else None for n in (of, taken_for))
        f1 = 2 * recall * precision / (recall + precision) if recall and precision else 0.0
        assert each.images == of and [each.recall, each.f1] == pytest.approx([100 * recall, 100 * f1], abs=1e-4)
        assert each.precision == (None if precision is None else pytest.approx(100 * precision, abs=1e-4))
    whole = metrics_of_test(labels, TopClasses(predicted[:, None], torch.ones(40, 1)), names)
    assert whole["balanced_accuracy"] == pytest.approx(sum(each.recall for each in found) / len(found), abs=1e-3)
    assert whole["macro_f1"] == pytest.approx(sum(each.f1 for each in found) / len(found), abs=1e-3)


def test_class_without_a_prediction_has_no_precision():
    (first, _) = class_metrics(torch.tensor([0, 1]), torch.tensor([1, 1]), ["cat", "dog"])
    assert (first.recall, first.precision, first.f1) == (0.0, None, 0.0)


def test_most_frequent_errors():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3])
    predicted = torch.tensor([2, 0, 2, 2, 0, 3, 1, 0, 2, 0, 4])
    # Of 1, which is once taken for each of 0, 2 and 3, the lowest.
    assert most_frequent_errors(labels, predicted) == {0: (2, 2), 1: (0, 1), 2: (0, 2), 3: (4, 1)}
    assert most_frequent_errors(labels, labels) == {}


def test_predictions_csv_agrees_with_its_metrics(run):
    folder, metrics = run
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for test, count in metrics["images"]["tests"].items():
        own = [row for row in rows if row["test"] == test]
        assert len(own) == count and len({row["image"] for row in own}) == count
        for column, accuracy in (("predicted", metrics["tuned"]), ("zero_shot", metrics["zero_shot"])):
            right = sum(row[column] == row["label"] for row in own)
            assert 100 * right / count == pytest.approx(accuracy[test], abs=1e-3)
        assert all(float(row["probability"]) >= float(row["probability_2"]) for row in own)
        correct = Counter(csv_text(row["label"]) for row in own if row["predicted"] == row["label"])
        for each in metrics["by_class"][test]["classes"]:
            assert each["recall"] == pytest.approx(100 * correct[each["name"]] / each["images"], abs=1e-3)
    assert json.loads((folder / "metrics.json").read_text())["by_class"] == metrics["by_class"]
