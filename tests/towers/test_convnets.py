"""Towers in stages: the step is the caller's own wherever it is cut, and maps that are kept stay as they are."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import timm_models
import torch
from models import openai_models, tiny_clip
from own_step import assert_is_the_own_step
from timm.layers import HybridEmbed
from timm.models.convnext import ConvNeXt
from timm.models.fastvit import FastVit, RepConditionalPosEnc
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vitamin import GeGluMlp, MbConvStages, VitCfg
from timm_models import LABELS, TOKENS, Family, batch_norms, cut, each_cut, randomise, timm_clip
from torch import nn

import skipkernels as sk
from skipkernels.testing import saved_bytes
from skipkernels.towers import UnsupportedModel
from skipkernels.towers.families.convnets import ResNetTower

CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24), "num_classes": 12}
FASTVIT = {
    "layers": (1, 1, 2, 1),
    "embed_dims": (8, 8, 16, 32),
    "token_mixers": ("repmixer", "repmixer", "repmixer", "attention"),
    "pos_embs": (None, None, None, partial(RepConditionalPosEnc, spatial_shape=(7, 7))),
    "se_downsamples": (False, False, True, True),
    "num_classes": 12,
}
SWIN = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4, "num_classes": 12}
RESNET = {"layers": [1, 2, 1, 1], "width": 8, "image_size": 32, "patch_size": None}


def convnext(**rest) -> nn.Module:
    return timm_clip(ConvNeXt(**{**CONVNEXT, **rest}), 32)


def convnext_projected() -> nn.Module:
    """As with timm_proj="linear" in a config of open_clip."""
    trunk = ConvNeXt(**{**CONVNEXT, "num_classes": 0})
    return timm_clip(trunk, 32, nn.Sequential(nn.Dropout(0.0), nn.Linear(24, 12, bias=False)))


def fastvit(**rest) -> nn.Module:
    return timm_clip(FastVit(**{**FASTVIT, **rest}), 32)


def fused_fastvit() -> nn.Module:
    """As it is deployed: every branch and batch norm in one convolution."""
    model = fastvit(stem_use_scale_branch=False, lkc_use_act=True)
    for module in model.visual.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    return model


def swin(**rest) -> nn.Module:
    return timm_clip(SwinTransformer(**{**SWIN, **rest}), 32)


def vitamin(**rest) -> nn.Module:
    """Two stages of convolutions, of one and two blocks, and a transformer of two."""
    backbone = MbConvStages(VitCfg(embed_dim=(8, 16, 24), depths=(1, 2, 1), stem_width=8))
    shape = {"img_size": 32, "patch_size": 1, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 12}
    vit = {"mlp_layer": GeGluMlp, "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg"}
    embed = partial(HybridEmbed, backbone=backbone, proj=False)
    return timm_clip(VisionTransformer(embed_layer=embed, **{**shape, **vit, **rest}), 32)


def resnet() -> nn.Module:
    return randomise(tiny_clip(vision=RESNET)).double().eval()


FAMILIES = {
    "convnext": Family(convnext, 32, 5),
    "convnext_projected": Family(convnext_projected, 32, 5),
    "fastvit": Family(fastvit, 32, 5),
    "fused_fastvit": Family(fused_fastvit, 32, 5),
    "swin": Family(swin, 32, 4),
    "vitamin": Family(vitamin, 32, 5),
    "vitamin_token": Family(partial(vitamin, class_token=True, global_pool="token", reg_tokens=1), 32, 5),
    "resnet": Family(resnet, 32, 5),
}


@each_cut(FAMILIES)
def test_the_step_is_the_models_own(family, skip):
    reductions = timm_models.assert_own_step(family, skip).reductions
    assert "run as your modules" in reductions["image.fused_block"].reason


@each_cut(FAMILIES, lowest=1)
def test_maps_are_constants(family, skip):
    timm_models.assert_features_are_constants(family, skip)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_nothing_is_added_to_the_callers_model(family):
    for skip in (0, 2):
        timm_models.assert_nothing_is_added(family, skip)


@each_cut({name: FAMILIES[name] for name in ("fastvit", "resnet")})
def test_batch_norms_know_their_side(family, skip):
    timm_models.assert_batch_norms_know_their_side(family, skip)


@pytest.mark.parametrize(
    ("make", "skip"),
    [
        (partial(convnext, drop_path_rate=0.5), 0),
        (partial(convnext, drop_path_rate=0.5), 2),
        (partial(swin, drop_path_rate=0.5), 2),
        (partial(vitamin, patch_drop_rate=0.5), 2),
        (partial(vitamin, patch_drop_rate=0.5), 4),
    ],
    ids=["convnext_all", "convnext", "swin", "patches_above", "patches_below"],
)
def test_what_is_dropped_in_training(make, skip):
    timm_models.assert_draws_as_the_model(Family(make, 32, 5), skip)


def test_a_stage_may_be_empty():
    timm_models.assert_own_step(Family(partial(convnext, depths=(1, 0, 2, 1)), 32, 4), 1)


@pytest.mark.parametrize("make", [convnext, fastvit, swin, vitamin], ids=["convnext", "fastvit", "swin", "vitamin"])
def test_the_models_own_checkpointing_changes_nothing(make):
    model = make()
    model.visual.set_grad_checkpointing(True)
    for skip in (0, 2):
        assert_is_the_own_step(cut(model, skip), Family(make, 32, 5).images(), TOKENS, LABELS)


@pytest.mark.parametrize("name", ["convnext", "fastvit", "swin", "vitamin", "resnet"])
def test_an_altered_block_is_followed_and_an_altered_stage_refused(name):
    family = FAMILIES[name]
    model = family.make()
    trunk = getattr(model.visual, "trunk", model.visual)
    stages = {"swin": "layers.1", "vitamin": "patch_embed.backbone.stages.1", "resnet": "layer2"}
    stage = trunk.get_submodule(stages.get(name, "stages.2"))
    block = getattr(stage, "blocks", stage)[0]
    block.register_forward_hook(lambda mod, args, out: out * 1.1)
    assert_is_the_own_step(cut(model, 1), family.images(), TOKENS, LABELS)
    assert_is_the_own_step(cut(model, family.depth - 1), family.images(), TOKENS, LABELS)
    stage.register_forward_hook(lambda mod, args, out: out.square())
    with pytest.raises(UnsupportedModel, match="has hooks, and SkipCLIP does not call this module"):
        cut(model, 1)


@pytest.mark.parametrize("skip", range(6), ids=lambda skip: f"skip{skip}")
def test_openais_resnet(skip):
    visual = randomise(openai_models().ModifiedResNet((1, 2, 1, 1), 12, 8, 32, 8)).double().eval()
    tower = ResNetTower(SimpleNamespace(visual=visual, encode_image=visual))
    tower.skip = skip
    assert len(tower.blocks) == 5 and tower.image_size == (32, 32)
    images = FAMILIES["resnet"].images().float()  # cast, as its own forward does
    features = tower.lower(images)
    features = features if skip == 0 else features.detach()
    kept, trained = features.detach().clone(), list(tower.upper_parameters())
    got, expected = (
        torch.autograd.grad(embeddings.square().sum(), trained)
        for embeddings in (tower.upper(features), visual(images))
    )
    assert features.equal(kept)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["convnext", "swin", "vitamin", "resnet"])
def test_with_little_memory_the_step_is_the_same(name):
    family = FAMILIES[name]
    model = family.make()
    images, saved = family.images(), {}
    for memory in ("fast", "min"):
        clip = sk.SkipCLIP(model, TOKENS, skip_layers=(1, 1), keep_ratio=1.0, memory=memory)
        features = clip.encode_lower(images)
        saved[memory] = saved_bytes(lambda clip=clip, features=features: clip.encode_upper(features))
        assert_is_the_own_step(clip, images, TOKENS, LABELS)
    assert saved["min"] < saved["fast"] / 2


def test_with_little_memory_a_batch_norm_counts_once():
    counted = []
    for memory in ("fast", "min"):
        model = resnet().train()
        clip = sk.SkipCLIP(model, TOKENS, skip_layers=(1, 1), memory=memory)
        clip(FAMILIES["resnet"].images(), LABELS).loss.backward()
        counted.append([norm.num_batches_tracked.item() for norm in batch_norms(model)])
    assert counted[0] == counted[1] and set(counted[0]) == {0, 1}


@pytest.mark.gpu
def test_what_is_below_the_cut_lives_elsewhere_with_its_statistics():
    model = resnet().cuda()
    clip = sk.SkipCLIP(model, TOKENS, skip_layers=(2, 1), keep_ratio=1.0)
    images, labels = FAMILIES["resnet"].images().cuda(), LABELS.cuda()
    expected = clip(images, labels).loss
    clip = sk.SkipCLIP(model, TOKENS, skip_layers=(2, 1), keep_ratio=1.0, lower_device="cpu")
    visual = model.visual
    assert not any(tensor.is_cuda for part in (visual.bn1, visual.layer1) for tensor in part.state_dict().values())
    assert all(tensor.is_cuda for tensor in visual.layer3.state_dict().values())
    torch.testing.assert_close(clip(images, labels).loss, expected, rtol=1e-6, atol=0)


def test_maps_of_three_rows_are_no_images():
    model = swin(img_size=(12, 16), patch_size=4, window_size=2, depths=(1, 1))  # maps [3, 4, 8] in front of the second
    clip = sk.SkipCLIP(model, TOKENS, skip_layers=(1, 1), keep_ratio=1.0)
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    features = clip.encode_lower(images)
    assert features.shape[1:] == (3, 4, 8)
    assert clip(features, LABELS[:2]).loss.equal(clip(images, LABELS[:2]).loss)


@pytest.mark.parametrize("name", ["convnext", "swin", "vitamin", "resnet"])
def test_half_precision_and_autocast(name):
    family = FAMILIES[name]
    clip = cut(family.make().bfloat16(), 2)
    clip(family.images().bfloat16(), LABELS).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in clip.trainable_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert cut(family.make().float(), 2)(family.images().float(), LABELS).loss.isfinite()


def test_statistics_that_the_model_updates_below_the_cut_are_not_those_of_kept_maps():
    """The caller's own call in training mode: batch norms below the cut then count what they see."""
    model = resnet()
    clip, images = cut(model, 3), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    maps = clip.encode_lower(images)
    model.train().encode_image(images)
    with pytest.raises(RuntimeError, match="weights below the cut have changed"):
        clip(maps, LABELS[:3])
    clip.refresh()
    clip(clip.encode_lower(images), LABELS[:3])
