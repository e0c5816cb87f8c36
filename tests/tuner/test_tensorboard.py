"""TensorBoard's scalars, with a stand-in for it, and with itself where it is installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
import warnings

import pytest

from skipkernels.tuner.tensorboard import open_board

ROW = {
    "epoch": 3,
    "loss": 0.5,
    "lr": {"text": 2e-3, "image": 1e-3},
    "steps": 20,
    "kept_classes": 11.0,
    "seconds": 2.5,
    "accuracy": {"base": 60.0, "new": None, "harmonic": None},
    "kept_histogram": {"11": 20},
    "budget": {"step": 2.0, "evaluation": 0.5},
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
    """In place of SummaryWriter."""

    def __init__(self, log_dir: str):
        self.log_dir, self.scalars, self.flushed, self.closed = log_dir, {}, 0, False
        importlib.import_module("tensorboard.compat.notf")  # as TensorBoard asks whether to do without TensorFlow

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def flush(self):
        self.flushed = len(self.scalars)

    def close(self):
        self.closed = True


def stand_in(monkeypatch, writer) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_what_is_written_of_a_row(monkeypatch, tmp_path):
    stand_in(monkeypatch, Writer)
    board = open_board(tmp_path)
    board.row(ROW)
    writer = board._writer
    assert writer.log_dir == str(tmp_path)
    assert writer.scalars == {(tag, 3): value for tag, value in SCALARS.items()}
    assert writer.flushed == len(SCALARS), "a run that is killed has all its epochs"
    board.close()
    assert writer.closed
    assert "tensorboard.compat.notf" not in sys.modules, "for others TensorBoard is as it was"


def test_a_row_without_most_of_it(monkeypatch, tmp_path):
    stand_in(monkeypatch, Writer)
    board = open_board(tmp_path)
    board.row({"epoch": 1, "loss": None, "accuracy": {"base": 1.0}, "budget": None})
    assert board._writer.scalars == {("accuracy/base", 1): 1.0}


def test_without_tensorboard_there_is_none_without_a_word(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_board(tmp_path) is None
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_a_tensorboard_that_does_not_work_is_spoken_of(monkeypatch, tmp_path):
    def fails(log_dir):
        raise TypeError("Descriptors cannot be created directly.")

    stand_in(monkeypatch, fails)
    with pytest.warns(UserWarning, match=r"TensorBoard .*TypeError: Descriptors .* no events"):
        assert open_board(tmp_path) is None


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = open_board(tmp_path)
    for epoch in (3, 4):
        board.row(ROW | {"epoch": epoch})
    events = EventAccumulator(str(tmp_path)).Reload()  # before it is closed
    assert set(events.Tags()["scalars"]) == set(SCALARS)
    for tag, value in SCALARS.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (3, pytest.approx(value)),
            (4, pytest.approx(value)),
        ]
    board.close()


def test_tensorflow_stays_out(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = "import pathlib; from skipkernels.tuner.tensorboard import open_board; open_board(pathlib.Path('.')).close()"
    python = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path[1:1] = {sys.path!r}; {code}"
    assert subprocess.run([sys.executable, "-c", python], cwd=tmp_path, check=False).returncode == 0
