"""The best epoch on validation images: kept at the end, resumed bit-exactly, and early stopping."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from safetensors.torch import load_file

from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError
from skipkernels.app.train import checkpoint, epochs_left, evaluate_run, tune
from skipkernels.app.train.run import _Run
from tests.app.train.runs import TEST_IMAGES, files, results, rows, small
from tests.app.train.test_resume import stopped

ACCURACIES = {1: 50.0, 2: 70.0, 3: 70.0, 4: 60.0}  # by epoch; of equal ones the last is kept
CHANGES = {"validation": "split", "epochs": 6, "patience": 2, "classes": 6, "shots": 2}
STEP = 8  # of the fourth epoch, of two steps each


class Killed(BaseException):
    """Stands in for SIGKILL."""


@pytest.fixture(scope="module", autouse=True)
def accuracies():
    """Validation accuracies of the rows."""
    complete = _Run._complete

    def completed(self, row, *others):
        complete(self, row | {"validation": ACCURACIES[row["epoch"]]}, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "_complete", completed)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run, its metrics, and its weights after each epoch."""
    folder, found, save = tmp_path_factory.mktemp("whole"), [], checkpoint.save

    def recorded(folder, file, weights, *others, **named):
        found.append({name: tensor.clone() for name, tensor in weights.items()})
        return save(folder, file, weights, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", recorded)
        return folder, tune(small(folder, **CHANGES)), found


def test_best_epoch_is_kept(whole):
    folder, metrics, weights = whole
    assert metrics["best_epoch"] == 3 and metrics["epochs"] == 4, "epoch 4 is the second that is not better than 2"
    kept = load_file(folder / "model.safetensors")
    assert all(kept[name].equal(weights[2][name]) for name in kept)
    assert not all(kept[name].equal(weights[3][name]) for name in kept)
    assert metrics["tuned"] == rows(folder)[2]["accuracy"] == evaluate_run(folder)
    assert metrics["validation"]["images"] == 3 * TEST_IMAGES and 0 <= metrics["validation"]["tuned"] <= 100
    assert [row["validation"] for row in rows(folder)] == list(ACCURACIES.values())
    assert "best.safetensors" not in files(folder) and epochs_left(folder) == 0


def test_resume_is_bitwise_identical(whole, tmp_path):
    """Interrupted when the best weights are not the last ones."""
    stopped(tmp_path, step=STEP, **CHANGES)
    assert "best.safetensors" not in files(tmp_path), "the last epoch is the best one"
    tune(small(tmp_path, resume=True, **CHANGES))
    assert results(tmp_path) == results(whole[0])
    assert files(tmp_path) == files(whole[0])


def test_patience_without_validation():
    with pytest.raises(InputError, match="patience needs validation images; add `validation=0.2`") as caught:
        TuneConfig(patience=3).resolved()
    assert caught.value.argument == "patience"
    with pytest.raises(InputError, match="validation must be a share between 0 and 1; got 1.5"):
        TuneConfig(validation=1.5).resolved()


# ---- files -------------------------------------------------------------------------------------------------------


STATE = {"config": {}, "rows": [], "seconds": 1.0, "trainer": None}
BEST = {1, 2}  # the last of them is kept


def work(folder, done: list[int]):
    """Save three epochs, and keep the best; `done` are those that are complete."""
    best = None
    for epoch in (1, 2, 3):
        tensors = {"weight": torch.full((3,), float(epoch))}
        arguments = folder, checkpoint.MODEL, tensors, {}, STATE | {"epoch": epoch}
        _, best = checkpoint.save(*arguments, best=best, is_best=epoch in BEST)
        done.append(epoch)
    checkpoint.keep_best(folder)
    done.append(4)


def value(path) -> float:
    return load_file(path)["weight"][0].item()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_kill_keeps_last_and_best_weights(tmp_path, monkeypatch, after):
    replace = os.replace
    for moment in itertools.count(1):
        folder, calls, done = tmp_path / f"{moment}", itertools.count(1), []
        folder.mkdir()

        def killed(*names, moment=moment, calls=calls):
            number = next(calls)
            if number >= moment and not (after and number == moment):
                raise Killed
            replace(*names)
            if number == moment:
                raise Killed

        monkeypatch.setattr(os, "replace", killed)
        try:
            work(folder, done)
        except Killed:
            pass
        monkeypatch.setattr(os, "replace", replace)
        for finder in (checkpoint.find, checkpoint.recover):
            found = finder(folder)
            if found is None:
                assert not done
                continue
            epoch, best = found.state["epoch"], value(checkpoint.best_weights(folder, found.state))
            assert epoch >= min(max(done, default=0), 3)
            assert best == min(epoch, 2) and value(found.weights) in {epoch, best}
            assert value(found.weights) == epoch or epoch == 3, "the best weights replace only the last ones"
        if 4 in done:
            assert {path.name for path in folder.iterdir()} == {"model.safetensors", "state.pt"}
            assert moment > 12 and value(folder / "model.safetensors") == 2
            return
