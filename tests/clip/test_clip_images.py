"""Features at the cut: equal to images, and refused when what computed them has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import skipkernels as sk
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.reference_step import assert_matches_reference_step

C = 7


def _scale(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out + 0.1 * out.sin()


# What is done to the blocks of a tower, given those of another model, and if a switch of the mode has to notice it.
ALTERED: dict[str, tuple[Callable[[nn.Module, nn.Module], object], bool]] = {
    "eps": (lambda blocks, _: setattr(blocks[0].ln_1, "eps", 0.3), True),
    "hook": (lambda blocks, _: blocks[0].register_forward_hook(_scale), True),
    "copied module": (lambda blocks, _: setattr(blocks[0], "mlp", copy.deepcopy(blocks[0].mlp)), True),
    "numpy": (lambda blocks, _: blocks[0].mlp.c_fc.weight.detach().numpy().__imul__(1.5), True),
    "data": (lambda blocks, _: blocks[0].mlp.c_fc.weight.data.copy_(blocks[0].mlp.c_fc.weight.data.flip(0)), True),
    "other block": (lambda blocks, others: setattr(blocks, "0", others[0]), False),
    "other mlp": (lambda blocks, others: setattr(blocks[0], "mlp", others[0].mlp), False),
    "other norm": (lambda blocks, others: setattr(blocks[0], "ln_1", others[0].ln_1), False),
}


@pytest.mark.parametrize(("alter", "switches"), ALTERED.values(), ids=ALTERED)
def test_features_before_an_alteration_are_refused(alter, switches):
    """Both towers are altered; images run through what is there now."""
    model, (images, labels) = tiny_clip(), tiny_batch(3, C)
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1, keep_ratio=1.0)
    features = clip.encode_lower(images)
    clip(features, labels)
    other = tiny_clip(seed=3).requires_grad_(False)
    for one, others in ((model.visual, other.visual), (model, other)):
        alter(one.transformer.resblocks, others.transformer.resblocks)
    if switches:
        clip.eval().train()
    for use in (lambda x: clip(x, labels), clip.predict, clip.encode_image, clip.encode_upper):
        with pytest.raises(RuntimeError, match="modules or weights below the cut have changed"):
            use(features)
    assert_matches_reference_step(clip, images, tiny_tokens(C), labels)
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
