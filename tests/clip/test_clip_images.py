"""Features at the cut: equal to images, and refused when what computed them has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_batch, tiny_clip, tiny_tokens
from reference_step import assert_matches_reference_step
from torch import nn

import skipkernels as sk

C = 7


def _scale(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out + 0.1 * out.sin()


@pytest.mark.parametrize(
    "alter",
    [
        lambda block: setattr(block.ln_1, "eps", 0.3),
        lambda block: setattr(block, "mlp", copy.deepcopy(block.mlp)),
        lambda block: block.register_forward_hook(_scale),
    ],
    ids=["eps", "replaced", "hook"],
)
def test_features_after_altered_lower_block(alter):
    model, (images, labels) = tiny_clip(), tiny_batch(3, C)
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1, keep_ratio=1.0)
    features = clip.encode_lower(images)
    alter(model.visual.transformer.resblocks[0])
    clip.eval().train()
    for use in (lambda: clip(features, labels), lambda: clip.predict(features), lambda: clip.encode_image(features)):
        with pytest.raises(RuntimeError, match="modules or weights below the cut have changed"):
            use()
    assert_matches_reference_step(clip, images, tiny_tokens(C), labels)


@pytest.mark.parametrize("path", ["", "mlp", "ln_1"])
def test_next_step_notices_replaced_lower_modules(path):
    model, (images, labels) = tiny_clip(), tiny_batch(3, C)
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1, keep_ratio=1.0)
    features = clip.encode_lower(images)
    clip(features, labels)
    for blocks in (model.visual.transformer.resblocks, model.transformer.resblocks):
        other = tiny_clip(seed=3).get_submodule(next(n for n, m in model.named_modules() if m is blocks))
        part = other[0].get_submodule(path).requires_grad_(False)
        blocks[0] = part if not path else blocks[0]
        if path:
            setattr(blocks[0], path, part)
    with pytest.raises(RuntimeError, match="modules or weights below the cut have changed"):
        clip(features, labels)
    assert_matches_reference_step(clip, images, tiny_tokens(C), labels)


@pytest.mark.parametrize("place", ["image", "text"])
@pytest.mark.parametrize(
    "write",
    [lambda p: p.detach().numpy().__imul__(1.5), lambda p: p.data.copy_(p.data.flip(0))],
    ids=["numpy", "data"],
)
def test_mode_switch_sees_weights_that_bypass_autograd(write, place):
    model, (images, labels) = tiny_clip(), tiny_batch(3, C)
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1, keep_ratio=1.0)
    features = clip.encode_lower(images)
    stack = model.visual.transformer if place == "image" else model.transformer
    write(stack.resblocks[0].mlp.c_fc.weight)
    clip.eval().train()
    if place == "text":
        assert_matches_reference_step(clip, images, tiny_tokens(C), labels)
    else:
        with pytest.raises(RuntimeError, match="weights below the cut have changed"):
            clip(features, labels)
        clip(images, labels)  # images run through the new weights
        clip.refresh()
        clip(clip.encode_lower(images), labels)


def test_swapped_in_average_is_no_change():
    model, (images, labels) = tiny_clip(), tiny_batch(3, C)
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1)
    features, kept = clip.encode_lower(images), copy.deepcopy(model.state_dict())
    model.load_state_dict({name: 1.1 * value for name, value in kept.items()})
    with pytest.raises(RuntimeError, match="weights below the cut have changed"):
        clip(features, labels)
    model.load_state_dict(kept)
    clip(features, labels)


def test_load_state_dict_before_features():
    """A resumed run: random weights, then a checkpoint, then features from its weights."""
    trained, (images, labels) = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1), tiny_batch(3, C)
    features, expected = trained.encode_lower(images), trained(images, labels).loss
    clip = sk.SkipCLIP(tiny_clip(seed=5), tiny_tokens(C), skip_layers=1)
    clip.load_state_dict(trained.state_dict())
    clip.sampler.load_state_dict(sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1).sampler.state_dict())
    assert clip(features, labels).loss.equal(expected)
    late = sk.SkipCLIP(tiny_clip(seed=5), tiny_tokens(C), skip_layers=1)
    stale = late.encode_lower(images)
    late.load_state_dict(trained.state_dict())
    with pytest.raises(RuntimeError, match="weights below the cut have changed"):
        late(stale, labels)
