"""Training mode of models and methods."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from skipkernels.app.train import trainer


def test_to_training_mode_keeps_batch_norm_statistics():
    """A batch of one class has no representative statistics."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    trainer.to_training_mode(SimpleNamespace(model=model, train=model.train))
    assert [module.training for module in model] == [False, True]
