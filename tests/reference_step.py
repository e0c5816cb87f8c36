"""Reference step by the caller's model: every layer, every class, gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import skipkernels as sk
from skipkernels.testing import gradients
from skipkernels.towers.fused_classes import unfused

# Relative to the norm of the gradient: two orders of summation through a few blocks at a temperature of 14. A gradient
# far smaller than the largest is rounding only, such as that of a key's bias. fp32 is 2^29 times coarser.
GRADIENT = {torch.float64: 1e-9, torch.float32: 2e-3}
NEGLIGIBLE = {torch.float64: 1e-10, torch.float32: 1e-5}
LOSS = {torch.float64: 1e-11, torch.float32: 1e-5}


def reference_gradients(
    clip: sk.SkipCLIP, images: Tensor, tokens: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss over all classes and its gradients, by the model's two encoders with their own blocks."""
    clip.model.zero_grad()
    torch.manual_seed(0)
    with unfused(clip.model.modules()):
        image, text = clip.images.tower.reference_forward(images), clip.texts.tower.reference_forward(tokens)
        image, text = (nn.functional.normalize(x, dim=-1) for x in (image, text))
        loss = nn.functional.cross_entropy(clip.model.logit_scale.exp() * image @ text.T, labels)
        return loss.detach(), gradients(clip.model, loss)


def assert_matches_reference_step(clip: sk.SkipCLIP, images: Tensor, tokens: Tensor, labels: Tensor) -> None:
    """Compare loss and gradients of SkipCLIP's step over all classes with those of the caller's model.

    Both start from the same seed, so that both draw the same random numbers in training.
    """
    loss, expected = reference_gradients(clip, images, tokens, labels)
    torch.manual_seed(0)
    out = clip(images, labels)
    assert len(out.class_ids) == len(tokens)
    assert out.loss.item() == pytest.approx(loss.item(), rel=LOSS[images.dtype])
    out.loss.backward()
    assert_equal_gradients(clip.model, expected, images.dtype)
    clip.model.zero_grad()


def assert_close_by_name(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare tensors relative to their norms; far below the largest, a gradient is rounding only."""
    assert found.keys() == expected.keys()
    largest = max(x.norm() for x in expected.values())
    for name, x in expected.items():
        assert (found[name] - x).norm() <= tolerance * max(x.norm(), 1e-3 * largest), name


def assert_equal_gradients(model: nn.Module, expected: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Compare the gradients of all parameters that train; others have none."""
    largest = max(0.01, *(gradient.norm() for gradient in expected.values()))  # with one class all are rounding
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif name not in expected:  # a parameter that the model itself does not use
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            error = (got - expected[name]).norm()
            assert error <= GRADIENT[dtype] * expected[name].norm() + NEGLIGIBLE[dtype] * largest, name
