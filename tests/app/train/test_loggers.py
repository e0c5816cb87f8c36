"""Loggers: TensorBoard with a fake writer and itself if installed, CSV, and stand-ins of W&B and MLflow."""

from __future__ import annotations

import csv
import importlib
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import types
import warnings

import pytest

import skipkernels
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.train.loggers import CsvLogger, open_loggers, open_tensorboard
from tests.app.train.runs import small

ROW = {
    "epoch": 3,
    "loss": 0.5,
    "lr": {"text": 2e-3, "image": 1e-3},
    "steps": 20,
    "kept_classes": 11.0,
    "seconds": 2.5,
    "accuracy": {"base": 60.0, "new": None, "harmonic": None},
    "kept_histogram": {"11": 20},
    "stage_seconds": {"step": 2.0, "evaluation": 0.5},
}
SCALARS = {
    "loss": 0.5,
    "kept_classes": 11.0,
    "seconds": 2.5,
    "lr/text": 2e-3,
    "lr/image": 1e-3,
    "accuracy/base": 60.0,
    "seconds/step": 2.0,
    "seconds/evaluation": 0.5,
}


class Writer:
    """Stands in for SummaryWriter."""

    def __init__(self, log_dir: str):
        self.log_dir, self.scalars, self.flushed, self.closed = log_dir, {}, 0, False
        importlib.import_module("tensorboard.compat.notf")  # TensorBoard's check for TensorFlow

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def flush(self):
        self.flushed = len(self.scalars)

    def close(self):
        self.closed = True


def use_writer(monkeypatch, writer) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_event_writer_scalars(monkeypatch, tmp_path):
    use_writer(monkeypatch, Writer)
    events = open_tensorboard(tmp_path)
    events.write(ROW)
    writer = events._writer
    assert writer.log_dir == str(tmp_path)
    assert writer.scalars == {(tag, 3): value for tag, value in SCALARS.items()}
    assert writer.flushed == len(SCALARS), "a killed run has all its epochs"
    events.close()
    assert writer.closed
    assert "tensorboard.compat.notf" not in sys.modules, "TensorBoard is unchanged for other code"


def test_event_writer_incomplete_row(monkeypatch, tmp_path):
    use_writer(monkeypatch, Writer)
    events = open_tensorboard(tmp_path)
    events.write({"epoch": 1, "loss": None, "accuracy": {"base": 1.0}, "stage_seconds": None})
    assert events._writer.scalars == {("accuracy/base", 1): 1.0}


def test_open_tensorboard_missing_is_silent(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_tensorboard(tmp_path) is None
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_open_tensorboard_failure_warns(monkeypatch, tmp_path):
    def fails(log_dir):
        raise TypeError("Descriptors cannot be created directly.")

    use_writer(monkeypatch, fails)
    with pytest.warns(UserWarning, match=r"TensorBoard .*TypeError: Descriptors .* no events"):
        assert open_tensorboard(tmp_path) is None


def test_event_writer_with_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = open_tensorboard(tmp_path)
    for epoch in (3, 4):
        events.write(ROW | {"epoch": epoch})
    found = EventAccumulator(str(tmp_path)).Reload()  # before the writer is closed
    assert set(found.Tags()["scalars"]) == set(SCALARS)
    for tag, value in SCALARS.items():
        assert [(event.step, event.value) for event in found.Scalars(tag)] == [
            (3, pytest.approx(value)),
            (4, pytest.approx(value)),
        ]
    events.close()


def test_open_tensorboard_imports_no_tensorflow(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = "import pathlib, skipkernels.app.train.loggers as t; t.open_tensorboard(pathlib.Path('.')).close()"
    python = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path[1:1] = {sys.path!r}; {code}"
    assert subprocess.run([sys.executable, "-c", python], cwd=tmp_path, check=False).returncode == 0


def test_csv_logger_columns_and_resume(tmp_path):
    logger = CsvLogger(tmp_path / "metrics.csv", [ROW])
    logger.write(ROW | {"epoch": 4, "validation": 70.0, "loss": None})
    with (tmp_path / "metrics.csv").open() as file:
        first, second = csv.DictReader(file)
    assert first == {"epoch": "3"} | {name: str(value) for name, value in SCALARS.items()} | {"validation": ""}
    assert second["epoch"] == "4" and second["validation"] == "70.0" and second["loss"] == ""


class Recorded(types.ModuleType):
    """Stands in for wandb and mlflow; records the calls."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *values, **named: self.calls.append((name, values, named)) or self


def test_wandb_and_mlflow_calls(monkeypatch, tmp_path):
    config, wandb, mlflow = TuneConfig(log=("wandb,mlflow",)), Recorded("wandb"), Recorded("mlflow")
    for module in (wandb, mlflow):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    opened = list(open_loggers(config, tmp_path, []))
    for logger in opened:
        logger.write(ROW | {"accuracy": {"caf\u00e9 %": 60.0}})
        logger.close()
    assert [name for name, _, _ in wandb.calls] == ["init", "log", "finish"]
    assert wandb.calls[0][2]["config"]["shots"] == 16 and wandb.calls[1][2] == {"step": 3}
    assert [name for name, _, _ in mlflow.calls] == ["start_run", "log_params", "log_metrics", "end_run"]
    assert mlflow.calls[2][1][0]["accuracy/caf\u00e9 _"] == 60.0


@pytest.mark.parametrize(
    ("log", "message"),
    [(("tensorflow",), "no logger 'tensorflow'; choose of tensorboard, csv, wandb, mlflow, or none"),
     (("csv,nowhere",), "no logger 'nowhere'"), (("wandb",), "wandb is not installed: pip install wandb")],
)  # fmt: skip
def test_unknown_loggers_are_refused_before_the_run(log, message, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        TuneConfig(log=log, device="cpu").resolved()


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
        skipkernels.tune(small(tmp_path, log=("csv",), epochs=1, classes=4, shots=1), loggers=[mine])
    assert mine.epochs == [1, "closed"] and "epoch 1/1: loss" in caplog.text
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["accuracy/base"]) == json.loads((tmp_path / "metrics.jsonl").read_text())["accuracy"]["base"]
    assert not list(tmp_path.glob("events*"))
