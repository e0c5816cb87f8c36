"""Every family of models at every cut: the step equals that of the model itself, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import skipkernels as sk
from skipkernels import reference
from skipkernels.testing import saved_bytes
from tests.reference_step import LOSS
from tests.timm_models import batch_norms, convnext, eva, naflex, swin, vit, vitamin
from tests.towers.families import ENCODERS, FAMILIES, LABELS, STAGED, TIMM, Family, like_another


def rows(names: Iterable[str]) -> Any:
    return pytest.mark.parametrize("family", [pytest.param(FAMILIES[name], id=name) for name in names])


# Image towers with code of their own; the others have the blocks and the embedding of one of these.
OF_TIMM, OF_STAGES = ([name for name, family in of.items() if len(family.cuts) > 1] for of in (TIMM, STAGED))


def dtype_of(clip: sk.SkipCLIP) -> torch.dtype:
    return clip.model.logit_scale.dtype


def lower_modules(clip: sk.SkipCLIP) -> list[nn.Module]:
    """Modules below the cut of the image tower."""
    tower = clip.images.tower
    parts = (*tower.embedding, *tower.blocks[: tower.skip]) if tower.skip else ()
    return [part for part in parts if isinstance(part, nn.Module)]


def without(family: Family, clip: sk.SkipCLIP) -> dict[str, str]:
    """Reductions that a cut of the family does not have, with words of the reason."""
    found = dict(family.without)
    for name, tower in (("image", clip.images.tower), ("text", clip.texts.tower)):
        if tower.skip == 0:
            found[f"{name}.no_input_gradient"] = "nothing is skipped"
        if tower.skip == len(tower.blocks):
            found[f"{name}.pooled_last_block"] = "every block is skipped"
    return found | ({"text.features_kept": "nothing is skipped"} if clip.texts.tower.skip == 0 else {})


CUTS = [
    pytest.param(family, skip, id=f"{name}-skip{skip}") for name, family in FAMILIES.items() for skip in family.cuts
]


@pytest.mark.parametrize(("family", "skip"), CUTS)
def test_step_equals_model(family, skip):
    clip = family.cut(skip)
    assert len(clip.images.tower.blocks) == family.depth
    expected = without(family, clip)
    assert {name for name, reduction in clip.reductions.items() if not reduction.enabled} == expected.keys()
    assert all(words in clip.reductions[name].reason for name, words in expected.items())
    family.check_step(clip)


@rows(["openai", "hf", "siglip", "coca", *OF_TIMM, *OF_STAGES])
def test_features_are_constant(family):
    """Features at the cut give the same step as images, twice, and neither is written to."""
    for skip in ((1, 1), (family.depth, 1)):
        clip = family.cut(skip, chunk=2)
        images = family.images(dtype_of(clip))
        expected, before = clip(images, LABELS).loss, images.clone()
        features = clip.encode_lower(images)
        kept = features.clone()
        for _ in range(2):
            loss = clip(features, LABELS).loss
            loss.backward()
            assert loss.equal(expected) and features.equal(kept) and images.equal(before)


@rows(OF_STAGES)
def test_model_is_left_unchanged(family):
    """Modes and state dict of the caller's model."""
    for skip in ((0, 1), (2, 1)):
        model = family.make()
        model.visual.train()
        modes, before = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
        clip = family.cut(skip, model)
        if skip[0]:  # otherwise the embedding trains and updates its statistics
            clip.encode_lower(family.images())
        assert [module.training for module in model.modules()] == modes
        after = model.state_dict()
        assert list(after) == list(before) and all(after[name].equal(value) for name, value in before.items())


@rows(["mobile_clip", "fastvit", "resnet"])
@pytest.mark.parametrize("skip", [0, 2, None], ids=["none", "two", "all"])
def test_batch_norms_update_above_cut_only(family, skip):
    """In training mode batch norms above the cut use and count the batch, those below do neither."""
    model, images = family.make().train(), family.images()
    clip = family.cut((family.depth if skip is None else skip, 1), model)
    frozen = {norm for part in lower_modules(clip) for norm in batch_norms(part)}
    before = {norm: (norm.running_mean.clone(), norm.num_batches_tracked.clone()) for norm in batch_norms(model)}
    loss = clip(images, LABELS).loss
    for norm, (mean, batches) in before.items():
        same = norm.running_mean.equal(mean) and norm.num_batches_tracked.equal(batches)
        assert same == (norm in frozen)
    for part in lower_modules(clip):
        part.eval()
    family.check_step(clip)
    torch.testing.assert_close(clip(images, LABELS).loss, loss, rtol=1e-11, atol=0)


DRAWS = {
    "drop_path": (partial(vit, drop_path_rate=0.5), 2, 16),
    "patches": (partial(vit, patch_size=2, patch_drop_rate=0.5), 0, 16),
    "attention": (partial(vit, attn_drop_rate=0.5), 2, 16),
    "eva_patches": (partial(eva, patch_size=2, patch_drop_rate=0.5), 0, 16),
    "naflex_patches": (partial(naflex, patch_drop_rate=0.5), 0, 16),
    "convnext_all": (partial(convnext, drop_path_rate=0.5), 0, 32),
    "convnext": (partial(convnext, drop_path_rate=0.5), 2, 32),
    "swin": (partial(swin, drop_path_rate=0.5), 2, 32),
    "vitamin_patches": (partial(vitamin, patch_drop_rate=0.5), 2, 32),
}


@pytest.mark.parametrize(("make", "skip", "size"), DRAWS.values(), ids=DRAWS)
def test_training_draws_as_the_model(make, skip, size):
    """In training mode dropout above the cut draws as in the caller's model."""
    family, model = like_another(make, size=size), make().train()
    clip, images = family.cut((skip, 1), model), family.images()
    for part in lower_modules(clip):
        part.eval()
    embeddings = []
    for encode in (model.encode_image, clip.encode_image):
        torch.manual_seed(3)
        embeddings.append(encode(images))
    torch.testing.assert_close(*embeddings, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(clip.encode_image(images), embeddings[1]), "no dropout was applied"


@rows(["clip", "eva02", "mobile_clip", "convnext", "fastvit", "swin", "vitamin"])
def test_checkpointing_of_the_model_changes_nothing(family):
    model = family.make()
    model.visual.set_grad_checkpointing(True)
    for skip in ((0, 1), (2, 1)):
        family.check_step(family.cut(skip, model))


@rows(["openai", "hf", "coca", "clip", "eva02", "convnext", "swin", "vitamin", "resnet"])
def test_memory_min_same_step(family, monkeypatch):
    monkeypatch.setattr("skipkernels.memory.free_bytes", lambda device: 0)
    model, saved = family.make(), {}
    for memory in ("fast", "min", "auto"):
        clip = family.cut((1, 1), model, memory=memory)
        features = clip.encode_lower(family.images(dtype_of(clip)))
        saved[memory] = saved_bytes(lambda clip=clip, features=features: clip.encode_upper(features))
        family.check_step(clip)
    assert saved["auto"] == saved["min"] < saved["fast"] / 2


@rows(["clip", "eva02", "convnext", "resnet"])
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bf16_step(family, autocast):
    """Rounding of the cosines to 8 bits is multiplied by a scale of 12: two digits of the loss are left."""
    expected = family.cut((1, 1), family.make().float())(family.images(torch.float32), LABELS).loss
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        clip = family.cut((1, 1), family.make().to(dtype))
        loss = clip(family.images(dtype), LABELS).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=5e-2)
    assert all(parameter.grad.isfinite().all() for parameter in clip.trainable_parameters())


@rows(["openai", "hf", "siglip", "coca", "coca_correct", *ENCODERS])
def test_pair_loss_of_other_captions_equals_model(family):
    """Captions that are not those of the classes, and share the first token only."""
    captions = family.tokens[[4, 0, 1]].clone()
    if family.tokens is not FAMILIES["bert"].tokens:
        captions[:, 1] = torch.tensor([7, 8, 9])
    clip = sk.SkipCLIP(family.make(), family.tokens[:2], skip_layers=1)
    images = family.images(dtype_of(clip))
    encoded = clip.images.tower.reference_forward(images), clip.texts.tower.reference_forward(captions)
    expected = reference.contrastive_loss(*encoded, clip.model.logit_scale.exp())
    torch.testing.assert_close(sk.pairs.pair_loss(clip, images, captions), expected, rtol=LOSS[images.dtype], atol=0)
