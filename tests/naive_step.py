"""A step of SkipCLIP compared with the naive one of `naive.py`, on a copy of the model: classes, loss, gradients."""

from __future__ import annotations

import copy

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import skipkernels as sk
from skipkernels.testing import gradients
from tests import naive
from tests.reference_step import LOSS, assert_equal_gradients


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy of a model, all of which requires gradients: the naive functions cut them off."""
    plain = copy.deepcopy(model).requires_grad_(True)
    plain.zero_grad()
    return plain


def assert_same_loss(
    clip: sk.SkipCLIP, loss: Tensor, plain: nn.Module, expected: Tensor, frozen: frozenset[str] = frozenset()
) -> None:
    """Compare a loss, and its gradient of every parameter of the model, with those of a copy.

    All parameters above the cut train, but for scale and bias of the logits and those that the test froze.
    """
    dtype = next(plain.parameters()).dtype
    assert loss.item() == pytest.approx(expected.item(), rel=LOSS[dtype])
    clip.model.zero_grad()
    loss.backward()
    found = gradients(plain, expected)
    trained = {name for name, p in clip.model.named_parameters() if p.requires_grad}
    assert trained - {"logit_scale"} == found.keys() - {"logit_scale", "logit_bias", *frozen}
    assert_equal_gradients(clip.model, found, dtype)
    clip.model.zero_grad()


def assert_step_equals_naive(
    clip: sk.SkipCLIP,
    tokens: Tensor,
    images: Tensor,
    labels: Tensor,
    *,
    quick: bool = False,
    train_text: bool = True,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    frozen: frozenset[str] = frozenset(),
) -> sk.SkipOutput:
    """Compare a step, or an evaluation, with the naive loss over the classes that it kept."""
    plain = plain_copy(clip.model)
    if not train_text:
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))
    out = clip(images, labels)
    logits = naive.cosine_logits(plain, images, tokens[out.class_ids], clip.skip_layers, quick)
    weight = None if class_weight is None else class_weight.to(images.dtype)[out.class_ids]
    expected = F.cross_entropy(logits, out.targets, weight, label_smoothing=label_smoothing)
    assert_same_loss(clip, out.loss, plain, expected, frozen)
    return out
