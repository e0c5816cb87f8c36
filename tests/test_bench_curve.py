"""bench.curve: what does not fit is skipped with the reason, and the columns follow from the times."""

from __future__ import annotations

import argparse
import math

import pytest

from bench import ceilings, measure
from bench.budget import NO_TIME, Budget, CostModel, Probe
from bench.curve import OURS, PUBLISHED, Curve

NAMES = (OURS, PUBLISHED, "other")


class Constant(Curve):
    """Implementations that take 10 s each, by prediction, for any number of classes."""

    columns = (
        "implementation model B C precision p20_ms p50_ms p80_ms rounds faster gflop floor_ms above_floor note".split()
    )
    probes = 4, 12
    compared = (OURS,)
    unchecked = "compared at {} classes"

    def build(self, classes, keys, folder, *, probing=False):
        return dict.fromkeys(keys, lambda: None)

    def seconds(self, classes, key):
        return 10.0

    def reason(self, classes, key):
        return "left out: slow" if classes > 1000 and key[0] != OURS else ""

    def sizes(self, key, function, found):
        return {"gflop": 2.0}

    def moved(self, function):
        return 10**9


@pytest.fixture
def curve(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(ceilings, "matrix_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(ceilings, "bandwidth", lambda device: 1e9)
    milliseconds = {OURS: [0.5, 0.5], PUBLISHED: [1.0, 3.0], "other": [0.25, 0.25]}
    timed = lambda functions, *_, **__: {key: milliseconds[key[0]] for key in functions}  # noqa: E731
    monkeypatch.setattr(measure, "time_alternately", timed)
    args = argparse.Namespace(precision=["fp32"], implementation=NAMES, classes=[10], device=measure.CPU)
    args.__dict__ |= {"rounds": 2, "seconds": math.inf, "no_save": False, "budget": Budget()}
    return Constant(args, "model", 4)


def test_rows_have_ratios_and_floors(curve):
    ours, published, other = curve.rows(10)
    assert (ours["faster"], published["faster"], other["faster"]) == ("", 4.0, 0.5)
    assert (ours["p50_ms"], ours["floor_ms"], ours["above_floor"]) == (500.0, 3000.0, 0.167)
    assert ours["note"] == "" and ours["rounds"] == 2 and list(ours) == curve.columns


@pytest.mark.parametrize(("most", "seconds", "rounds"), [(9, 0.0, 3), (9, math.inf, 9), (1, math.inf, 1)])
def test_rows_are_timed_in_three_rounds_at_least(curve, most, seconds, rounds):
    curve.args.rounds, curve.args.seconds = most, seconds
    assert {row["rounds"] for row in curve.rows(10)} == {rounds}


@pytest.mark.parametrize(("seconds", "notes"), [(25.0, ["", "", NO_TIME]), (0.0, [NO_TIME] * 3)])
def test_rows_share_the_budget(curve, monkeypatch, seconds, notes):
    monkeypatch.setattr(Budget, "left", property(lambda budget: seconds))
    rows = curve.rows(10)
    assert [row["note"] for row in rows] == notes
    assert [row["p50_ms"] == "" for row in rows] == [bool(note) for note in notes]


def test_rows_state_the_reason_and_what_was_not_compared(curve):
    assert [row["note"] for row in curve.rows(5000)] == ["compared at 12 classes", "left out: slow", "left out: slow"]


def test_measure_predicts_and_appends(curve, tmp_path):
    curve.measure("curve")
    assert curve.cost_models["other", "fp32"] == CostModel.of(Probe(4, 0.25, 0), Probe(12, 0.25, 0))
    (table,) = tmp_path.glob("*/curve.csv")
    assert len(table.read_text().splitlines()) == 1 + len(NAMES)
