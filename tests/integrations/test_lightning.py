"""SkipCLIP in Lightning."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import skipkernels as sk
from skipkernels.integrations.lightning import SkipModule
from tests.integrations.problems import Problem, small_problem, trained
from tests.integrations.runners import lightning as runner

STEPS, SAVED = 6, 4  # of the only epoch


@pytest.fixture(scope="module")
def short() -> Problem:
    """A few steps on some of the classes, which are drawn."""
    return small_problem(STEPS)._replace(keep_ratio=0.5)


def fit(short: Problem, folder, **arguments) -> sk.SkipCLIP:
    """Train an epoch with a loader that resumes within it, with a checkpoint of the step SAVED."""
    module = runner.plug(short.clip(), short)
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
    module = runner.plug(short.clip(), short)
    [logged] = runner.trainer(tmp_path).validate(module, DataLoader(short.dataset, 5), verbose=False)
    logits = module(short.images)
    assert logits.shape == (len(short.images), len(short.tokens))
    expected = (logits.argmax(dim=1) == short.labels).float().mean().item()
    assert logged["val_accuracy"] == pytest.approx(expected)
    loss = torch.nn.functional.cross_entropy(logits, short.labels).item()
    assert logged["val_loss"] == pytest.approx(loss, rel=1e-4)


def test_predict_of_images_with_labels(short, tmp_path):
    module = runner.plug(short.clip(), short)
    for dataset in (short.dataset, short.images):
        logits = torch.cat(runner.trainer(tmp_path).predict(module, DataLoader(dataset, 5)))
        torch.testing.assert_close(logits, module(short.images))


def test_gradients_are_clipped_before_the_update(short, tmp_path):
    module = SkipModule(short.clip(), text_lr=1e-2, image_lr=1e-2, optimizer=sk.FusedSGD)
    before = trained(module.clip)
    trainer = runner.trainer(tmp_path, max_steps=1, gradient_clip_val=1e-3)
    trainer.fit(module, DataLoader(short.dataset, short.batch_size))
    assert 0 < (trained(module.clip) - before).norm() <= 1.01e-5  # 1e-2 · 1e-3, and its rounding


def module_of(short: Problem, **options) -> SkipModule:
    return SkipModule(short.clip(), **short.rates(), **options)


def test_several_validation_loaders(short, tmp_path):
    module = module_of(short)
    loaders = [DataLoader(TensorDataset(short.images[rows], short.labels[rows]), 4) for rows in (slice(4), slice(4, 8))]
    for run in ("validate", "test"):
        name = run.replace("validate", "val")
        logged = getattr(runner.trainer(tmp_path), run)(module, loaders, verbose=False)
        for number, (values, rows) in enumerate(zip(logged, (slice(4), slice(4, 8)), strict=True)):
            loss = torch.nn.functional.cross_entropy(module(short.images[rows]), short.labels[rows]).item()
            assert values[f"{name}_loss/dataloader_idx_{number}"] == pytest.approx(loss, rel=1e-4)


def test_schedules(short, tmp_path):
    """A schedule on a plateau watches val_loss; a dictionary of Lightning has its own interval."""

    def plateau(optimizer):
        return ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)  # no value is an improvement

    def each_step(optimizer):
        return {"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"}

    def other_metric(optimizer):
        return {"scheduler": plateau(optimizer), "monitor": "train_loss"}

    cases = ((plateau, True, 0.1), (each_step, False, 0.5**STEPS), (other_metric, False, 0.1))
    for schedule, validates, factor in cases:
        trainer, loader = runner.trainer(tmp_path), DataLoader(short.dataset, short.batch_size)
        trainer.fit(module_of(short, schedule=schedule), loader, loader if validates else None)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        assert rates == pytest.approx([factor * 1e-2, factor * 5e-3])


def test_hyperparameters_are_in_the_checkpoint(short, tmp_path):
    module, trainer = module_of(short, momentum=0.9), runner.trainer(tmp_path)
    trainer.fit(module, DataLoader(short.dataset, short.batch_size))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    clip = short.clip()
    loaded = SkipModule.load_from_checkpoint(tmp_path / "a.ckpt", clip=clip, weights_only=True)
    assert dict(loaded.hparams) == {"text_lr": 1e-2, "image_lr": 5e-3, "momentum": 0.9}
    assert loaded(short.images).equal(module(short.images))
    assert loaded.configure_optimizers().defaults["momentum"] == 0.9
