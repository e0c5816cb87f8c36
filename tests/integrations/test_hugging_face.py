"""SkipCLIP in `transformers.Trainer`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

import skipkernels as sk
from skipkernels.integrations import hugging_face
from tests.integrations.problems import Problem, small_problem
from tests.integrations.problems import trained as vector
from tests.integrations.runners import hugging_face as runner

STEPS, SAVED = 6, 4  # of the only epoch


@pytest.fixture(scope="module")
def short() -> Problem:
    """A few steps on some of the classes, which are drawn."""
    return small_problem(STEPS)._replace(keep_ratio=0.5)


def trainer_of(clip: sk.SkipCLIP, problem: Problem, folder, **arguments) -> Trainer:
    """Shuffled batches, saved once in the epoch."""
    saving = {"save_strategy": "steps", "save_steps": SAVED, "logging_strategy": "steps", "logging_steps": 1}
    ours = runner.plug(problem, folder, **(saving | arguments))
    return Trainer(clip, train_dataset=problem.dataset, eval_dataset=problem.dataset, **ours)


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory):
    """Trainer after an uninterrupted epoch, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = trainer_of(short.clip(), short, folder)
    trainer.train()
    return trainer, folder / f"checkpoint-{SAVED}"


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_resume_within_an_epoch(trained, short, tmp_path):
    whole, checkpoint = trained
    clip = short.clip()
    with torch.no_grad():
        for parameter in clip.trainable_parameters():
            parameter.zero_()
    resumed = trainer_of(clip, short, tmp_path)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    state, expected = clip.state_dict(), whole.model.state_dict()
    assert [name for name in expected if not state[name].equal(expected[name])] == []
    assert losses(resumed) == losses(whole)


def test_accuracy(trained, short, tmp_path):
    """A quarter of the images have the class of rank 0 as their label, and so on to rank 3."""
    clip = trained[0].model
    ranked = clip.predict(short.images).argsort(dim=1, descending=True)  # [n, C]
    dataset = TensorDataset(short.images, ranked[torch.arange(len(ranked)), torch.arange(len(ranked)) % 4])
    args = runner.arguments(short, tmp_path, per_device_eval_batch_size=5, include_for_metrics=["inputs"])
    trainer = Trainer(clip, **hugging_face.trainer_arguments(args, **short.rates()))
    assert trainer.evaluate(dataset)["eval_accuracy"] == 0.25
    predictions = torch.from_numpy(trainer.predict(dataset).predictions)
    torch.testing.assert_close(predictions, clip.predict(short.images), rtol=1e-4, atol=1e-4)


def test_predict_without_labels(trained, short, tmp_path):
    """Batches of five and of one image."""
    clip = trained[0].model
    args = runner.arguments(short, tmp_path, per_device_eval_batch_size=5, include_for_metrics=["inputs"])
    trainer = Trainer(hugging_face.Predictor(clip), **hugging_face.trainer_arguments(args, **short.rates()))
    logits = clip.predict(short.images[:11])
    for dataset in (short.images[:11], [{"pixel_values": image} for image in short.images[:11]]):
        found = trainer.predict(dataset)
        assert found.label_ids is None
        torch.testing.assert_close(torch.from_numpy(found.predictions), logits, rtol=1e-4, atol=1e-4)


def groups(trainer: Trainer) -> list[tuple[str, float, float, set[int]]]:
    """Name, rate, weight decay and parameters of each group of the trainer's optimizer."""
    return [
        (group["name"], group["lr"], group["weight_decay"], {id(p) for p in group["params"]})
        for group in trainer.optimizer.param_groups
    ]


def expected_groups(trainer: Trainer, weight_decay: float = 5e-4) -> list[tuple[str, float, float, set[int]]]:
    found = trainer.model.parameter_groups(text_lr=1e-2, image_lr=5e-3)
    return [(group["name"], group["lr"], weight_decay, {id(p) for p in group["params"]}) for group in found]


def test_model_init(trained, short, tmp_path):
    """Each trial has another model, and its own weight decay, as in a hyperparameter search."""
    args = runner.arguments(short, tmp_path, weight_decay=5e-4)
    ours = hugging_face.trainer_arguments(args, **short.rates(), momentum=0.9)
    trainer = Trainer(model_init=lambda: short.clip(), train_dataset=short.dataset, **ours)
    models = []
    for args.weight_decay in (5e-4, 0.3):  # as hyperparameter_search sets it
        trainer.train()
        assert groups(trainer) == expected_groups(trainer, args.weight_decay)
        models.append(trainer.model)
    assert models[0] is not models[1]
    assert vector(models[0]).equal(vector(trained[0].model))
    assert not vector(models[1]).equal(vector(models[0]))


@pytest.mark.filterwarnings("error")
def test_gradient_checkpointing(trained, short, tmp_path):
    clip = short.clip()
    has_name = any(field.name == "activation_checkpointing" for field in dataclasses.fields(TrainingArguments))
    name = "activation_checkpointing" if has_name else "gradient_checkpointing"  # in older versions
    trainer = trainer_of(clip, short, tmp_path, save_strategy="no", **{name: True})
    trainer.train()
    assert clip.images.tower.cut.memory == clip.texts.tower.cut.memory == "min"
    assert losses(trainer) == pytest.approx(losses(trained[0]), rel=1e-5)


def test_features_of_a_cache(trained, short, tmp_path):
    clip = short.clip()
    cache = sk.FeatureCache.build(tmp_path / "features", clip, short.dataset, dtype="fp32", progress=False)
    ours = runner.plug(short, tmp_path, logging_strategy="steps", logging_steps=1)
    trainer = Trainer(clip, train_dataset=cache, **ours)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(trained[0]), rel=1e-4)


@pytest.mark.parametrize("label", [3, np.int32(3), torch.tensor(3), np.array(3)], ids=repr)
def test_collate_whole_numbers(label):
    assert hugging_face.collate([(torch.zeros(1), label)])["labels"].tolist() == [3]


def test_optimizer_is_of_the_parameters_that_train(short, tmp_path):
    """The optimizer has A and B of a later add_lora; FusedSGD does not update weights before gradients are clipped."""
    clip = short.clip()
    args = runner.arguments(short, tmp_path, max_steps=1, max_grad_norm=1e-4)
    ours = hugging_face.trainer_arguments(args, text_lr=1e-2, image_lr=1e-2, optimizer=sk.FusedSGD)
    sk.add_lora(clip, rank=2)
    before = [p.detach().clone() for p in clip.trainable_parameters()]
    Trainer(clip, train_dataset=short.dataset, **ours).train()
    moved = torch.cat([(p - old).flatten() for p, old in zip(clip.trainable_parameters(), before, strict=True)])
    assert 0 < moved.norm() <= 1.01e-6  # 1e-2 · 1e-4, and its rounding
