"""Refusals of the integrations: the call, the error, and words of it. Settings of Dassl are in test_dassl.py."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import Trainer

import skipkernels as sk
from skipkernels.integrations import hugging_face
from skipkernels.integrations.lightning import SkipModule
from skipkernels.integrations.open_clip import ClassModel
from tests.integrations.problems import Problem, small_problem
from tests.integrations.runners import hugging_face as hugging_face_runner
from tests.integrations.runners import lightning as lightning_runner


class Case:
    """A small problem, its SkipCLIP, and what each integration makes of them."""

    def __init__(self, problem: Problem, folder):
        self.problem, self.folder = problem, folder
        self.clip = problem.clip()
        self.tokens, self.images = problem.tokens, problem.images[:1]

    @property
    def model(self) -> ClassModel:
        return ClassModel(self.clip)

    def trainer(self, model: nn.Module, problem: Problem | None = None) -> Trainer:
        problem = problem or self.problem
        return Trainer(model, train_dataset=problem.dataset, **hugging_face_runner.plug(problem, self.folder))

    def train_on_features(self) -> None:
        problem = self.problem._replace(images=self.clip.encode_lower(self.problem.images), skip_layers=0)
        self.trainer(problem.clip(), problem).train()

    def lightning_step(self, batch) -> None:
        lightning_runner.plug(self.clip, self.problem).training_step(batch, 0)

    def same_prompts(self) -> None:
        tokens = self.tokens[[0, 1, 0]]
        ClassModel(sk.SkipCLIP(copy.deepcopy(self.problem.model), tokens, skip_layers=2)).class_ids(tokens)


CALLS: list[tuple[Callable[[Case], object], type[Exception], str]] = [
    (lambda case: ClassModel(nn.DataParallel(case.clip)), TypeError, "got DataParallel. Wrap the ClassModel"),
    (lambda case: case.model(case.images), TypeError, "both images and captions are needed"),
    (lambda case: case.model(case.images, ["a cat"]), TypeError, "text must be a tensor, .*; got list. Tokenize"),
    (lambda case: case.model.fsdp_shard_modules(), NotImplementedError, "Train with DistributedDataParallel"),
    (lambda case: case.model.class_ids(torch.stack([case.tokens[0], case.tokens[0].roll(1)])), ValueError,
     r"captions \[1\] of the batch are not the prompt of a class"),
    (lambda case: case.model.class_ids(case.tokens[:2, :5]), ValueError, r"got torch.int64 \[2, 5\]"),
    (Case.same_prompts, ValueError, "classes 0 and 2 have the same prompt"),
    (lambda case: hugging_face.collate([([1.0], 1)]), TypeError,
     "^collate: images must be tensors, as the model's image transform returns; got list"),
    (lambda case: hugging_face.collate([{"image": torch.zeros(1)}]), ValueError,
     "^collate: .*keys pixel_values and, except for prediction, labels; got image"),
    (lambda case: hugging_face.collate([(torch.zeros(1), [1, 2])]), TypeError,
     "^collate: labels must be class ids, one whole number for each image"),
    (lambda case: hugging_face.Predictor(case.problem.model), TypeError, "Predictor: clip must be a SkipCLIP"),
    (lambda case: hugging_face.trainer_arguments(case.clip, text_lr=1, image_lr=1), TypeError,
     "args must be transformers.TrainingArguments; got SkipCLIP"),
    (lambda case: case.trainer(nn.Linear(1, 1)).create_optimizer(), TypeError,
     "trainer_arguments: clip must be a SkipCLIP; got Linear"),
    (Case.train_on_features, ValueError, r"features can't be cached; got \[2, 65"),
    (lambda case: SkipModule(nn.Linear(1, 1), text_lr=1, image_lr=1), TypeError,
     "SkipModule: clip must be a SkipCLIP; got Linear"),
    (lambda case: case.lightning_step({"image": 1, "label": 2}), TypeError, "batch must be a pair .*; got dict of 2"),
    (lambda case: case.lightning_step((1, 2, 3)), TypeError, "batch must be a pair .*; got tuple of 3"),
]  # fmt: skip


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_problem(steps=2)


@pytest.mark.parametrize(("call", "error", "words"), CALLS, ids=[words for *_, words in CALLS])
def test_call_is_refused(call, error, words, problem, tmp_path):
    with pytest.raises(error, match=words):
        call(Case(problem, tmp_path))


@pytest.mark.parametrize(
    ("name", "package", "words"),
    [
        ("lightning", "lightning.pytorch", r"needs Lightning .*pip install 'skipkernels\[lightning\]'"),
        ("dassl", "dassl", "needs Dassl .* It is on no package index: install https"),
    ],
    ids=["lightning", "dassl"],
)
def test_missing_package(name, package, words, monkeypatch):
    monkeypatch.delitem(sys.modules, f"skipkernels.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=words):
        importlib.import_module(f"skipkernels.integrations.{name}")
