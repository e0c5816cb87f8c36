"""Mixed precision of models and steps; a step does not synchronize."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from skipkernels.app.train import evaluate_run, tune
from skipkernels.app.train import trainer as trainer_module
from skipkernels.app.train.trainer import Trainer
from tests.app.runs import losses, rows, small


def test_bf16_keeps_accuracy(run, tmp_path):
    folder, _ = run
    metrics = tune(small(tmp_path, epochs=1, precision="bf16"))
    assert losses(tmp_path) == pytest.approx(losses(folder)[:1], rel=0.1)
    expected = rows(folder)[0]["accuracy"]["base"]
    assert metrics["tuned"]["base"] == pytest.approx(expected, abs=9)  # one of 12 images, 8.3 %, may change
    assert evaluate_run(tmp_path) == metrics["tuned"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_does_not_synchronize(tmp_path, monkeypatch, precision):
    step, steps = Trainer._step, []

    def watched(self, *args):
        steps.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")  # the first compiles kernels
        try:
            return step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", watched)
    tune(small(tmp_path, epochs=1, device="cuda", precision=precision))
    assert len(steps) == 6


def test_to_training_mode_keeps_batch_norm_statistics():
    """A batch of one class has no representative statistics."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    trainer_module.to_training_mode(SimpleNamespace(model=model, train=model.train))
    assert [module.training for module in model] == [False, True]
