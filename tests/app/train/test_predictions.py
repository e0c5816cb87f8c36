"""The file of predictions."""

from __future__ import annotations

import pytest

from skipkernels.app.data import InputError
from skipkernels.app.train import predictions
from tests.app.report.pages import (
    NASTY,
    predicted,
)


def test_predictions_round_trip_and_damage(tmp_path):
    path, tests = tmp_path / predictions.PREDICTIONS, [predicted(NASTY, "caf\udce9"), predicted("new")]
    tests[1].tuned = None
    predictions.save(path, tests)
    again = predictions.load(path)
    assert [(test.name, test.classes, test.thumbnails) for test in again] == [
        (test.name, test.classes, test.thumbnails) for test in tests
    ]
    assert again[1].tuned is None and again[0].labels.equal(tests[0].labels)
    assert all(one.equal(other) for one, other in zip(again[0].tuned, tests[0].tuned, strict=True))
    data = path.read_bytes()
    for damaged in (data[:-9], data[: len(data) // 2], b"", data.replace(b'format":"1', b'format":"2')):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            predictions.load(path)
