"""SkipCLIP in Lightning."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import skipkernels as sk
from bench.trainers import lightning as runner
from bench.trainers.common import Problem, small_problem, trained
from skipkernels.integrations import lightning
from skipkernels.integrations.lightning import SkipModule

STEPS, SAVED = 6, 4  # of the only epoch


@pytest.fixture(scope="module")
def short() -> Problem:
    """A few steps on some of the classes, which are drawn."""
    return small_problem(STEPS)._replace(keep_ratio=0.5)


def fit(short: Problem, folder, **arguments) -> sk.SkipCLIP:
    """Train an epoch with a loader that resumes within it, with a checkpoint of the step SAVED."""
    module = runner.plug(short.implementations()["skipkernels"](), short)
    cache = sk.FeatureCache.in_memory(list(short.dataset))
    saving = ModelCheckpoint(folder, "step-{step}", every_n_train_steps=SAVED, auto_insert_metric_name=False)
    trainer = runner.trainer(folder, callbacks=[saving], enable_checkpointing=True)
    trainer.fit(module, cache.loader(short.batch_size, "random"), **arguments)
    return module.clip


def test_resume_within_an_epoch(short, tmp_path):
    expected = fit(short, tmp_path / "whole").state_dict()
    path = tmp_path / "whole" / f"step-{SAVED}.ckpt"
    state = fit(short, tmp_path / "resumed", ckpt_path=path).state_dict()
    assert [name for name in expected if not state[name].equal(expected[name])] == []


def test_validation_logs_accuracy_of_all_classes(short, tmp_path):
    module = runner.plug(short.implementations()["skipkernels"](), short)
    [logged] = runner.trainer(tmp_path).validate(module, DataLoader(short.dataset, 5), verbose=False)
    logits = module(short.images)
    assert logits.shape == (len(short.images), len(short.tokens))
    expected = (logits.argmax(dim=1) == short.labels).float().mean().item()
    assert logged["val_accuracy"] == pytest.approx(expected)
    loss = torch.nn.functional.cross_entropy(logits, short.labels).item()
    assert logged["val_loss"] == pytest.approx(loss, rel=1e-4)


def test_bad_use(short):
    with pytest.raises(TypeError, match="SkipModule: clip must be a SkipCLIP; got Linear"):
        lightning.SkipModule(torch.nn.Linear(1, 1), text_lr=1, image_lr=1)
    module = runner.plug(short.implementations()["skipkernels"](), short)
    for batch, found in (({"image": 1, "label": 2}, "dict of 2"), ((1, 2, 3), "tuple of 3")):
        with pytest.raises(TypeError, match=f"batch must be a pair .*; got {found}"):
            module.training_step(batch, 0)


def test_predict_of_images_with_labels(short, tmp_path):
    module = runner.plug(short.implementations()["skipkernels"](), short)
    for dataset in (short.dataset, short.images):
        logits = torch.cat(runner.trainer(tmp_path).predict(module, DataLoader(dataset, 5)))
        torch.testing.assert_close(logits, module(short.images))


def test_gradients_are_clipped_before_the_update(short, tmp_path):
    module = SkipModule(short.implementations()["skipkernels"](), text_lr=1e-2, image_lr=1e-2, optimizer=sk.FusedSGD)
    before = trained(module.clip)
    trainer = runner.trainer(tmp_path, max_steps=1, gradient_clip_val=1e-3)
    trainer.fit(module, DataLoader(short.dataset, short.batch_size))
    assert 0 < (trained(module.clip) - before).norm() <= 1.01e-5  # 1e-2 · 1e-3, and its rounding


def test_missing_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "skipkernels.integrations.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match="needs Lightning .*pip install 'skipkernels\\[lightning\\]'"):
        importlib.import_module("skipkernels.integrations.lightning")
