"""Loggers of the caller."""

from __future__ import annotations

import skipkernels
from tests.app.runs import small


def test_tune_writes_to_loggers(tmp_path, caplog):
    class Mine:
        def __init__(self):
            self.epochs = []

        def write(self, row):
            self.epochs.append(row["epoch"])

        def close(self):
            self.epochs.append("closed")

    mine = Mine()
    with caplog.at_level("INFO", "skipkernels"):
        skipkernels.tune(small(tmp_path, epochs=1, max_classes=4, shots=1), loggers=[mine])
    assert mine.epochs == [1, "closed"] and "epoch 1/1: loss" in caplog.text
