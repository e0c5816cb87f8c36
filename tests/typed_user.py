"""A program of a user, which `make types` checks strictly against the public interface."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import assert_type

import skipkernels as sk


def tune(model: nn.Module, tokens: Tensor, dataset: Dataset[tuple[Tensor, int]]) -> list[float]:
    clip = sk.SkipCLIP(model, tokens, skip_layers=0.5, keep_ratio=100, tail="resample")
    cache = sk.FeatureCache.build("features", clip, dataset, dtype="bf16")
    optimizer = sk.FusedSGD(clip.parameter_groups(text_lr=2e-5, image_lr=5e-6), momentum=0.9)
    step = sk.graphed(clip, optimizer, batch_size=4)
    losses = []
    for features, labels in cache.loader(batch_size=4, sampler="class_pure"):
        assert_type(step, sk.GraphedStep)
        assert_type(step(features, labels), sk.SkipOutput)
        losses.append(step(features, labels).loss.item())
    assert_type(clip.predict(next(iter(cache.loader()))[0]), Tensor)
    return losses


def own_loss(model: nn.Sequential, image: Tensor, text: Tensor) -> Tensor:
    assert_type(sk.fuse(model, memory="min"), nn.Sequential)
    scores: Tensor = sk.functional.class_scores(image, text)
    return scores.mean() + sk.functional.contrastive_loss(image, text, 100.0)


def classify(run: str, photos: list[str]) -> dict[str, float]:
    found = sk.Classifier.load(run, device="cpu").predict(photos, top=3, threshold=0.5)
    assert_type(found.probabilities, Tensor)
    return {f"{name}: {labels[0][0]}": labels[0][1] for name, labels in found}
