"""The best epoch on validation images: kept at the end, and resumed bit-exactly."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from skipkernels.app.train import checkpoint, evaluate_run, tune
from skipkernels.app.train.evaluation import Evaluator
from skipkernels.app.train.trainer import Trainer
from tests.app.runs import files, results, rows, small, stopped

ACCURACIES = {1: 50.0, 2: 70.0, 3: 70.0, 4: 60.0}  # by epoch; of equal ones the last is kept
CHANGES = {"validation": 0.5, "epochs": 4, "max_classes": 12, "shots": 1}
STEP = 8  # of the fourth epoch, of two steps each


@pytest.fixture(scope="module", autouse=True)
def accuracies():
    """Validation accuracies after each epoch."""
    epochs, train, evaluate = [], Trainer.epoch, Evaluator.evaluate

    def trained(self, *reports):
        epochs.append(self.epochs + 1)
        return train(self, *reports)

    def evaluated(self, method, *pretrained):
        found = evaluate(self, method, *pretrained)
        return found if pretrained else found._replace(validation=ACCURACIES[epochs[-1]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "epoch", trained)
        patch.setattr(Evaluator, "evaluate", evaluated)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run, its metrics, and its weights after each epoch."""
    folder, found, save = tmp_path_factory.mktemp("whole"), [], checkpoint.save

    def recorded(run, *others, **named):
        save(run, *others, **named)
        found.append(load_file(checkpoint.weights_of(run, len(found) + 1)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", recorded)
        return folder, tune(small(folder, **CHANGES)), found


def test_best_epoch_is_kept(whole):
    folder, metrics, weights = whole
    assert metrics["best_epoch"] == 3 and metrics["epochs"] == 4
    kept = load_file(folder / "model.safetensors")
    assert all(kept[name].equal(weights[2][name]) for name in kept)
    assert not all(kept[name].equal(weights[3][name]) for name in kept)
    assert metrics["tuned"] == rows(folder)[2]["accuracy"] == evaluate_run(folder)
    assert metrics["validation"]["images"] == 6 and 0 <= metrics["validation"]["tuned"] <= 100
    assert [row["validation"] for row in rows(folder)] == list(ACCURACIES.values())


def test_resume_is_bitwise_identical(whole, tmp_path):
    """Interrupted before and after an epoch that is not the best one."""
    stopped(tmp_path, step=STEP, **CHANGES)
    assert len(list((tmp_path / "checkpoint").glob("model-*"))) == 1, "the last epoch is the best one"
    tune(small(tmp_path, resume=True, **CHANGES))
    assert results(tmp_path) == results(whole[0])
    assert files(tmp_path) == files(whole[0])
