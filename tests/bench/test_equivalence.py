"""bench.equivalence, "Same result" in README: trainings part by rounding only, and a difference shows."""

from __future__ import annotations

import pytest
from torch.optim.lr_scheduler import LambdaLR

from bench import equivalence

CASE = equivalence.Case("ViT", (1, 2), text_lr=1e-2, image_lr=5e-3)


@pytest.fixture(scope="module")
def inputs():
    return equivalence.random_inputs(classes=8, each=2, tests=5)


@pytest.mark.parametrize(("precision", "rounding"), [("fp64", 1e-11), ("fp32", 1e-4)])
def test_trainings_part_by_rounding(inputs, precision, rounding):
    row = equivalence.compare(CASE, inputs.to(equivalence._DTYPES[precision]), steps=7)
    assert row["other_classes"] == 0 and row["predictions"] == 0 and row["steps"] == 7
    assert max(row[column] for column in ("loss", "weights", "change", "logits")) < rounding


def test_another_schedule_shows(inputs, monkeypatch):
    monkeypatch.setattr(equivalence, "cosine_with_warmup", lambda optimizer, **_: LambdaLR(optimizer, lambda _: 1.0))
    row = equivalence.compare(CASE, inputs, steps=7)
    assert row["change"] > 1e-2
