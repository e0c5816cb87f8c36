"""Gradients of a step by `graphed`, which on a GPU is a replay of a CUDA graph."""

from __future__ import annotations

import copy

import pytest

import skipkernels as sk
from bench import inputs, measure, training
from skipkernels.app.devices import autocast
from skipkernels.graphs import graphed_step as graphed
from skipkernels.testing import relative_error


@pytest.mark.parametrize("precision", inputs.PRECISIONS)
@pytest.mark.parametrize(
    ("model", "classes", "skip"), [("vit-tiny", 20, 3), pytest.param("ViT-B-16", 1000, 6, marks=pytest.mark.gpu)]
)
def test_no_worse_than_the_published_step(model, classes, skip, precision):
    """Against the published step in fp64, over the classes that the step kept; without a GPU the step is eager."""
    device = measure.default_device()
    batch = inputs.random_inputs(model, 4, classes, device)
    wide = batch._replace(model=copy.deepcopy(batch.model).double(), images=batch.images.double())
    published, exact = training.Published(batch, skip), training.Published(wide, skip)
    clip = sk.SkipCLIP(batch.model, batch.tokens, skip_layers=skip)
    # With a learning rate of 0 the weights stay, and the buffer is half of the last one, plus the gradient.
    optimizer = sk.FusedSGD(clip.trainable_parameters(), lr=0.0, momentum=0.5)
    step, features, labels = sk.graphed(clip, optimizer, batch_size=4), clip.encode_lower(batch.images), batch.labels
    trained = {name: p for name, p in batch.model.named_parameters() if p.requires_grad}
    before = {}
    for _ in range(graphed.WARMUP + 2):
        if before or optimizer.state:
            before = {name: optimizer.state[p]["momentum_buffer"].double().clone() for name, p in trained.items()}
        with autocast(precision, device):
            class_ids = step(features, labels).class_ids
    assert step.is_captured == (device.type == "cuda")
    theirs, right = published.gradients(precision, class_ids), exact.gradients("fp32", class_ids)  # without autocast
    for name, p in trained.items():
        gradient = optimizer.state[p]["momentum_buffer"].double() - before[name] / 2
        error, bound = (relative_error(x, right[name]) for x in (gradient, theirs[name]))
        assert error <= bound + training.SLACK[precision], f"{name}: {error:.2e} against {bound:.2e}"
