"""Loggers: TensorBoard, and loggers of the caller."""

from __future__ import annotations

import importlib.util

import pytest

import skipkernels
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.train.loggers import TensorBoardLogger, scalars
from tests.app.runs import small

ROW = {
    "epoch": 3,
    "loss": 0.5,
    "lr": {"text": 2e-3},
    "kept_classes": 11.0,
    "accuracy": {"base": 60.0, "new": None},
}


def test_tensorboard_has_each_epoch_before_it_is_closed(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    for epoch in (3, 4):
        logger.write(ROW | {"epoch": epoch})
    found = EventAccumulator(str(tmp_path)).Reload()
    for tag, value in scalars(ROW).items():
        assert [(event.step, event.value) for event in found.Scalars(tag)] == [
            (3, pytest.approx(value)),
            (4, pytest.approx(value)),
        ]
    assert set(found.Tags()["scalars"]) == set(scalars(ROW))
    logger.close()


def test_missing_logger_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="tensorboard is not installed: pip install tensorboard"):
        TuneConfig(log="tensorboard", device="cpu").resolved()


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
        skipkernels.tune(small(tmp_path, log="none", epochs=1, max_classes=4, shots=1), loggers=[mine])
    assert mine.epochs == [1, "closed"] and "epoch 1/1: loss" in caplog.text
    assert not list(tmp_path.glob("events*"))
