"""Comparison of variants on the same test images: p-values, and what is called best."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from skipkernels.app.report.study_page import explained, headline, tables
from skipkernels.app.results import predictions
from skipkernels.app.results.files import PREDICTIONS
from skipkernels.app.results.predictions import TestPredictions, TopClasses
from skipkernels.app.results.study import ACCURACY, COST, Study
from skipkernels.app.studies.compare import study_of
from skipkernels.app.studies.runs import Result
from skipkernels.app.studies.significance import compare_best, permutation_p


@pytest.mark.parametrize(("won", "lost"), [(5, 0), (9, 2), (6, 5)])
def test_permutation_p_of_one_seed_is_mcnemars(won, lost):
    """The exact test is binomial over the images that differ."""
    first = np.array([1] * won + [0] * lost + [1] * 10)
    second = np.array([0] * won + [1] * lost + [1] * 10)
    p = permutation_p({"all": first}, {"all": second}, 1, "all")
    exact = 2 * sum(math.comb(won + lost, k) for k in range(lost + 1)) / 2 ** (won + lost)
    assert p == pytest.approx(min(exact, 1.0), abs=0.015)  # three standard errors of 10,000 draws


@pytest.fixture
def study(tmp_path):
    """Function from the correct test images of each variant and seed to its study."""

    def made(right: dict[str, list[list[int]]]) -> Study:
        results = []
        for variant, seeds in right.items():
            for seed, correct in enumerate(seeds):
                folder, ids = tmp_path / f"{variant}-{seed}", torch.tensor(correct)[:, None]
                folder.mkdir()
                top = TopClasses(ids, torch.ones(ids.shape))
                test = TestPredictions(
                    "all", ["a", "b"], torch.ones(len(ids), dtype=torch.long), top, None, [""] * len(ids)
                )
                predictions.save(folder / PREDICTIONS, [test])
                metrics = {"protocol": "few-shot", "tuned": {"all": 100 * sum(correct) / len(correct)}}
                metrics |= {"images": {"tests": {"all": len(correct)}}, "seconds": None}
                results.append(Result(variant, seed, metrics, folder.name))
        columns = {ACCURACY: {"all": ("tuned", "all")}, COST: {"tuning, s": ("seconds",)}}
        return study_of("t", "", results, columns, compare_best(results, tmp_path, "all"))

    return made


def test_best_is_certain(study):
    found = study({"good": [[1] * 18 + [0] * 2] * 2, "bad": [[1] * 8 + [0] * 12] * 2})
    other = found.comparison["others"]["bad"]
    assert other["worse"] and other["p"] < 0.01 and other["difference"] == pytest.approx(50)
    assert headline(found) == "good has the best accuracy, 90.0 % (2 seeds, 20 test images)."
    table, _ = tables(found)
    assert {row.name: [str(cell) for cell in row.cells] for row in table.rows}["good"] == ["90.0 (69.9–97.2)"]
    assert "permutation test" in explained(found) and explained(found).startswith("2 seeds. ± is the 95 % interval")


def test_best_is_within_noise(study):
    found = study({"a": [[1] * 18 + [0] * 2], "b": [[1] * 17 + [0] * 3], "c": [[0] * 20]})
    assert [of["worse"] for of in found.comparison["others"].values()] == [False, True]
    assert headline(found).startswith("a has the highest accuracy, 90.0 % (1 seed, 20 test images).")
    assert headline(found).endswith(" These images and seeds don't tell it apart from b.")


def test_best_must_be_ahead_in_every_seed(study):
    ahead, behind = [1] * 40 + [0] * 10, [0] * 40 + [1] * 10
    found = study({"a": [ahead, ahead, behind], "b": [behind, behind, ahead]})
    other = found.comparison["others"]["b"]
    assert other["p"] < 0.05 and not other["every_seed"] and not other["worse"]


def test_compare_best_without_predictions(study, tmp_path):
    found = study({"a": [[1]], "b": [[0]]})
    (tmp_path / "b-0" / PREDICTIONS).unlink()
    assert compare_best([Result(**run) for run in found.runs], tmp_path, "all") is None
