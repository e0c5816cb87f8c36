"""Time training steps and predictions of SkipCLIP with pytest-benchmark, to compare two commits on one machine.

    git switch --detach main && pytest bench/test_steps.py --benchmark-autosave
    git switch - && pytest bench/test_steps.py --benchmark-compare --benchmark-compare-fail=median:5%

Four images from features at the cut, random weights, half of the blocks skipped.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import skipkernels as sk
from bench import measure
from bench.inputs import autocast, random_inputs

DEVICE = measure.default_device()


@functools.cache
def skip_clip(model: str, classes: int) -> tuple[sk.SkipCLIP, Tensor, Tensor]:
    """SkipCLIP, features at the cut, and labels."""
    inputs = random_inputs(model, 4, classes, DEVICE)
    clip = sk.SkipCLIP(inputs.model, inputs.tokens, skip_layers=0.5)
    return clip, clip.encode_lower(inputs.images), inputs.labels


@pytest.mark.parametrize(
    ("model", "classes", "precision"),
    [("vit-tiny", 20, "fp32"), ("ViT-B-16", 50, "fp32"), ("ViT-B-16", 50, "bf16")],
)
def test_step(benchmark: Any, model: str, classes: int, precision: str) -> None:
    clip, features, labels = skip_clip(model, classes)

    def step() -> None:
        clip.zero_grad()
        with autocast(DEVICE, precision):
            loss = clip(features, labels).loss
        loss.backward()
        measure.synchronize(DEVICE)

    benchmark(step)


@pytest.mark.parametrize(("model", "classes"), [("vit-tiny", 20), ("ViT-B-16", 50)])
def test_predict(benchmark: Any, model: str, classes: int) -> None:
    clip, features, _ = skip_clip(model, classes)
    weights = clip.trainable_parameters()

    def predict() -> None:
        torch.autograd.graph.increment_version(weights)  # the class embeddings are recomputed, as after an update
        clip.predict(features)
        measure.synchronize(DEVICE)

    benchmark(predict)
