"""Scales of the public functions, and calls that they do not support."""

from __future__ import annotations

import pytest
import torch

from skipkernels import functional


def loss_at(scale: float | torch.Tensor) -> torch.Tensor:
    return functional.class_sampled_ce(torch.eye(3, 5), torch.eye(4, 5), torch.tensor([0, 3, 1]), scale)


def test_a_number_and_a_tensor_are_the_same_scale():
    for scale in (torch.tensor(14.25), torch.tensor([14.25]), torch.tensor(14.25, dtype=torch.float64)):
        assert loss_at(scale).equal(loss_at(14.25))


def test_gradient_of_the_scale_has_its_shape_and_dtype():
    for scale in (torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(3.0, dtype=torch.float64)):
        scale.requires_grad_()
        loss_at(scale).backward()
        assert scale.grad.shape == scale.shape and scale.grad.dtype == scale.dtype


# ---- unsupported calls ---------------------------------------------------------------------------------------------


def test_forward_mode_is_refused():
    """A tangent of zero would be silently wrong."""
    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(lambda x: functional.mlp_activation(x), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        functional.mlp_activation(x)  # no tangent: no error
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            functional.class_sampled_logits(torch.autograd.forward_ad.make_dual(x, x), x, 1.0)


def test_autocast_casts_no_integers_and_no_fp64():
    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        functional.class_scores(x, x.bfloat16(), labels)
        for other in (x.long(), x.double()):
            with pytest.raises(TypeError, match="prototypes must be"):
                functional.class_scores(x, other, labels)
            with pytest.raises(TypeError, match="residual must be"):
                functional.add_layer_norm(x, other, torch.ones(4), torch.zeros(4))
