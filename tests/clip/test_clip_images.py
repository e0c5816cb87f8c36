"""Features at the cut: equal to images, and refused when what computed them has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.models import tiny_clip
from tests.towers.families import FAMILIES, LABELS, OPEN_CLIP

IMAGES = OPEN_CLIP.images()


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
    clip = OPEN_CLIP.cut(1)
    features = clip.encode_lower(IMAGES)
    clip(features, LABELS)
    other = tiny_clip(seed=3).requires_grad_(False)
    for one, others in ((clip.model.visual, other.visual), (clip.model, other)):
        alter(one.transformer.resblocks, others.transformer.resblocks)
    if switches:
        clip.eval().train()
    for use in (lambda x: clip(x, LABELS), clip.predict, clip.encode_image, clip.encode_upper):
        with pytest.raises(RuntimeError, match="modules or weights below the cut have changed"):
            use(features)
    OPEN_CLIP.check_step(clip)
    clip.refresh()
    clip(clip.encode_lower(IMAGES), LABELS)


def test_swapped_in_average_is_no_change():
    clip = OPEN_CLIP.cut(1)
    features, kept = clip.encode_lower(IMAGES), copy.deepcopy(clip.model.state_dict())
    clip.model.load_state_dict({name: 1.1 * value for name, value in kept.items()})
    with pytest.raises(RuntimeError, match="weights below the cut have changed"):
        clip(features, LABELS)
    clip.model.load_state_dict(kept)
    clip(features, LABELS)


def test_hooks_that_only_observe_are_no_change():
    """transformers leaves hooks on a model that was asked for its hidden states once."""
    family = FAMILIES["hf"]
    clip, images = family.cut(1), family.images()
    features = clip.encode_lower(images)
    with torch.no_grad():
        clip.model.vision_model(images, output_hidden_states=True)
    assert any(module._forward_hooks for module in clip.model.vision_model.encoder.layers[0].modules())
    with pytest.warns(UserWarning, match="a module of a block has hooks"):
        loss = clip.eval().train()(features, LABELS).loss
    torch.testing.assert_close(loss, family.cut(1)(images, LABELS).loss, rtol=1e-9, atol=0)


def test_load_state_dict_before_features():
    """A resumed run: random weights, then a checkpoint, then features from its weights."""
    trained, clip, late = OPEN_CLIP.cut(1), *(OPEN_CLIP.cut(1, tiny_clip(seed=5)) for _ in range(2))
    features, expected = trained.encode_lower(IMAGES), trained(IMAGES, LABELS).loss
    clip.load_state_dict(trained.state_dict())
    assert clip(features, LABELS).loss.equal(expected)
    stale = late.encode_lower(IMAGES)
    late.load_state_dict(trained.state_dict())
    with pytest.raises(RuntimeError, match="weights below the cut have changed"):
        late(stale, LABELS)
