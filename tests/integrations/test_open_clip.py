"""`integrations.open_clip` in open_clip's trainer."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import open_clip
import pytest
import torch
from open_clip_train import train as trainer
from open_clip_train.scheduler import cosine_lr
from torch import Tensor, nn

import skipkernels as sk
from skipkernels.app.demo import pictogram_tiny
from skipkernels.integrations.open_clip import ClassLoss, ClassModel, scaled_schedule
from tests.integrations.problems import Problem, small_problem, trained
from tests.integrations.runners import open_clip as runner

pictogram_tiny.register()  # so that open_clip knows its tokenizer


@pytest.fixture(scope="module")
def problem() -> Problem:
    return small_problem(steps=6)


@pytest.fixture
def clip(problem) -> sk.SkipCLIP:
    return skip_clip(problem)


def skip_clip(problem: Problem, **options: Any) -> sk.SkipCLIP:
    return sk.SkipCLIP(copy.deepcopy(problem.model), problem.tokens, skip_layers=2, **({"keep_ratio": 1.0} | options))


def test_captions_of_templates(problem):
    tokens = torch.stack([problem.tokens, problem.tokens.roll(1, 1)], dim=1)
    model = ClassModel(sk.SkipCLIP(copy.deepcopy(problem.model), tokens, skip_layers=2))
    assert model.class_ids(tokens[[5, 6], [0, 1]]).tolist() == [5, 6]


def test_features_and_class_ids(problem, clip):
    """Cached features at the cut and class ids, in place of images and captions."""
    features = clip.encode_lower(problem.images)
    assert fit(clip, problem.images, problem.tokens[problem.labels]).equal(
        fit(skip_clip(problem), features, problem.labels)
    )


def fit(clip: sk.SkipCLIP, images: Tensor, text: Tensor, batch_size: int = 2, **options: Any) -> Tensor:
    """Trained parameters after an epoch."""
    model, loss = ClassModel(clip), ClassLoss()
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=1e-2, image_lr=5e-3))
    runner.fit(model, loss, optimizer, runner.data(images, text, batch_size), **options)
    return trained(clip)


def test_accumulation(problem, clip):
    """Three batches of two are a batch of six; with all classes kept these are the same step."""
    text = problem.tokens[problem.labels]
    start = trained(clip)
    found = fit(clip, problem.images, text, accum_freq=3)
    expected = fit(skip_clip(problem), problem.images, text, batch_size=6)
    # Sums in fp32 in another order; two steps move the weights by about 1e-3 of their norm.
    assert (found - expected).norm() <= 1e-4 * (expected - start).norm()


def test_accumulation_draws_classes_once(problem):
    """The first pass over the batches, without gradients, changes no state."""
    clips = [skip_clip(problem, keep_ratio=0.5) for _ in range(2)]
    text = problem.tokens[problem.labels]
    for clip, batches in zip(clips, (1, 3), strict=True):
        fit(clip, problem.images, text, accum_freq=batches)
    assert clips[0].sampler.state_dict().keys() == clips[1].sampler.state_dict().keys()
    for name, state in clips[0].sampler.state_dict().items():
        assert state.equal(clips[1].sampler.state_dict()[name])


@pytest.mark.parametrize("is_scaled", [False, True], ids=["plain", "scaled"])
def test_rates_under_a_schedule(problem, clip, is_scaled):
    """open_clip 3 sets one rate for all groups."""
    model = ClassModel(clip)
    optimizer = torch.optim.SGD(model.parameter_groups(text_lr=1e-2, image_lr=2.5e-3))
    schedule = cosine_lr(optimizer, 1e-2, 0, 6)
    rates: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(
            model,
            ClassLoss(),
            optimizer,
            runner.data(problem.images, problem.tokens[problem.labels], 2),
            scaled_schedule(schedule, optimizer) if is_scaled else schedule,
        )
    expected = [0.5 * (1 + math.cos(math.pi * step / 6)) * 1e-2 for step in range(6)]
    assert rates == [[rate, rate * (0.25 if is_scaled else 1)] for rate in expected]
    found = [str(warning.message) for warning in caught if "ClassModel" in str(warning.message)]
    assert len(found) == (not is_scaled)
    assert all("both towers to 0.01, so text_lr and image_lr have no effect" in message for message in found)


def test_attributes_and_copies(problem, clip):
    model = ClassModel(clip)
    assert (model.context_length, model.visual.image_size) == (problem.tokens.shape[1], clip.image_size)
    for each in (model, copy.deepcopy(model)):
        assert each.class_ids(problem.tokens[5:6]).tolist() == [5]


def test_evaluation(problem, clip):
    """Open_clip's zero-shot classifier, and its metrics of pairs."""
    model = ClassModel(clip).eval()
    names = [f"class {n}" for n in range(12)]
    classifier = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer("pictogram-tiny"), names, ["a photo of a {}."], device="cpu"
    )
    # What `open_clip_train.zero_shot.run` does; it fails itself with NumPy 2.4, which refuses float() of an array.
    logits = 100.0 * model(image=problem.images)["image_features"] @ classifier
    reference = problem.model.encode_image(problem.images, normalize=True) @ classifier
    assert logits.argmax(dim=1).equal(reference.argmax(dim=1))
    val = runner.data(problem.images, problem.tokens[problem.labels], 4)
    metrics = trainer.evaluate(model, {"val": val}, 1, runner.arguments())
    ours = trainer.evaluate(OpenClip(problem.model), {"val": val}, 1, runner.arguments())
    assert metrics["clip_val_loss"] == pytest.approx(ours["clip_val_loss"], rel=1e-5)
    assert metrics["image_to_text_R@5"] == ours["image_to_text_R@5"]
    captions, class_ids = (model(text=x)["text_features"] for x in (problem.tokens[[3, 7]], torch.tensor([3, 7])))
    torch.testing.assert_close(class_ids, captions, rtol=1e-4, atol=1e-5)


class OpenClip(nn.Module):
    """Open_clip's model with `output_dict=True`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return dict(zip(("image_features", "text_features", "logit_scale"), self.model(image, text), strict=True))
