"""Towers in stages: the step equals the reference at every cut, and features are constant."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import timm_models
import torch
from models import openai_models, tiny_clip
from reference_step import assert_matches_reference_step
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
from skipkernels.towers import Cut, UnsupportedModel
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
    """Model with timm_proj="linear", an option of open_clip configs."""
    trunk = ConvNeXt(**{**CONVNEXT, "num_classes": 0})
    return timm_clip(trunk, 32, nn.Sequential(nn.Dropout(0.0), nn.Linear(24, 12, bias=False)))


def fastvit(**rest) -> nn.Module:
    return timm_clip(FastVit(**{**FASTVIT, **rest}), 32)


def fused_fastvit() -> nn.Module:
    """Deployed form: every branch and batch norm merged into one convolution."""
    model = fastvit(stem_use_scale_branch=False, lkc_use_act=True)
    for module in model.visual.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    return model


def swin(**rest) -> nn.Module:
    return timm_clip(SwinTransformer(**{**SWIN, **rest}), 32)


def vitamin(**rest) -> nn.Module:
    """Two convolutional stages of one and two blocks, and a transformer of two blocks."""
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


@each_cut(FAMILIES, variants=("convnext_projected", "fused_fastvit", "vitamin_token"))
def test_step_equals_reference(family, skip):
    reductions = timm_models.assert_matches_reference(family, skip).reductions
    assert "run their own forward" in reductions["image.fused_block"].reason


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_features_are_constant(family):
    timm_models.assert_features_are_constant(family, 2)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_model_is_left_unchanged(family):
    for skip in (0, 2):
        timm_models.assert_model_is_unchanged(family, skip)


@pytest.mark.parametrize("skip", [0, 2, 5], ids=lambda skip: f"skip{skip}")
@pytest.mark.parametrize("name", ["fastvit", "resnet"])
def test_batch_norms_update_above_cut_only(name, skip):
    timm_models.assert_batch_norms_update_above_cut_only(FAMILIES[name], skip)


@pytest.mark.parametrize(
    ("make", "skip"),
    [
        (partial(convnext, drop_path_rate=0.5), 0),
        (partial(convnext, drop_path_rate=0.5), 2),
        (partial(swin, drop_path_rate=0.5), 2),
        (partial(vitamin, patch_drop_rate=0.5), 2),
    ],
    ids=["convnext_all", "convnext", "swin", "patches"],
)
def test_training_draws_as_model(make, skip):
    timm_models.assert_draws_as_the_model(Family(make, 32, 5), skip)


def test_stage_without_blocks():
    timm_models.assert_matches_reference(Family(partial(convnext, depths=(1, 0, 2, 1)), 32, 4), 1)


@pytest.mark.parametrize("make", [convnext, fastvit, swin, vitamin], ids=["convnext", "fastvit", "swin", "vitamin"])
def test_model_checkpointing_changes_nothing(make):
    model = make()
    model.visual.set_grad_checkpointing(True)
    for skip in (0, 2):
        assert_matches_reference_step(cut(model, skip), Family(make, 32, 5).images(), TOKENS, LABELS)


@pytest.mark.parametrize("name", ["convnext", "fastvit", "swin", "vitamin", "resnet"])
def test_altered_block_is_followed_and_altered_stage_raises(name):
    family = FAMILIES[name]
    model = family.make()
    trunk = getattr(model.visual, "trunk", model.visual)
    stages = {"swin": "layers.1", "vitamin": "patch_embed.backbone.stages.1", "resnet": "layer2"}
    stage = trunk.get_submodule(stages.get(name, "stages.2"))
    block = getattr(stage, "blocks", stage)[0]
    block.register_forward_hook(lambda mod, args, out: out * 1.1)
    assert_matches_reference_step(cut(model, 1), family.images(), TOKENS, LABELS)
    assert_matches_reference_step(cut(model, family.depth - 1), family.images(), TOKENS, LABELS)
    stage.register_forward_hook(lambda mod, args, out: out.square())
    with pytest.raises(UnsupportedModel, match="has hooks, and SkipCLIP does not call this module"):
        cut(model, 1)


@pytest.mark.parametrize("skip", [0, 2, 5], ids=lambda skip: f"skip{skip}")
def test_openai_resnet(skip):
    visual = randomise(openai_models().ModifiedResNet((1, 2, 1, 1), 12, 8, 32, 8)).double().eval()
    tower = ResNetTower(SimpleNamespace(visual=visual, encode_image=visual))
    tower.cut = Cut(skip)
    assert len(tower.blocks) == 5 and tower.image_size == (32, 32)
    images = FAMILIES["resnet"].images().float()  # the tower casts them, as the forward of the model does
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
def test_memory_min_same_step(name):
    family = FAMILIES[name]
    model = family.make()
    images, saved = family.images(), {}
    for memory in ("fast", "min"):
        clip = sk.SkipCLIP(model, TOKENS, skip_layers=(1, 1), keep_ratio=1.0, memory=memory)
        features = clip.encode_lower(images)
        saved[memory] = saved_bytes(lambda clip=clip, features=features: clip.encode_upper(features))
        assert_matches_reference_step(clip, images, TOKENS, LABELS)
    assert saved["min"] < saved["fast"] / 2


def test_memory_min_updates_batch_norm_once():
    counted = []
    for memory in ("fast", "min"):
        model = resnet().train()
        clip = sk.SkipCLIP(model, TOKENS, skip_layers=(1, 1), memory=memory)
        clip(FAMILIES["resnet"].images(), LABELS).loss.backward()
        counted.append([norm.num_batches_tracked.item() for norm in batch_norms(model)])
    assert counted[0] == counted[1] and set(counted[0]) == {0, 1}


@pytest.mark.gpu
def test_lower_device_holds_batch_norm_statistics():
    model = resnet().cuda()
    clip = sk.SkipCLIP(model, TOKENS, skip_layers=(2, 1), keep_ratio=1.0)
    images, labels = FAMILIES["resnet"].images().cuda(), LABELS.cuda()
    expected = clip(images, labels).loss
    clip = sk.SkipCLIP(model, TOKENS, skip_layers=(2, 1), keep_ratio=1.0, lower_device="cpu")
    visual = model.visual
    assert not any(tensor.is_cuda for part in (visual.bn1, visual.layer1) for tensor in part.state_dict().values())
    assert all(tensor.is_cuda for tensor in visual.layer3.state_dict().values())
    torch.testing.assert_close(clip(images, labels).loss, expected, rtol=1e-6, atol=0)


def test_features_with_three_rows_are_not_images():
    model = swin(
        img_size=(12, 16), patch_size=4, window_size=2, depths=(1, 1)
    )  # maps [3, 4, 8] in front of the second block
    clip = sk.SkipCLIP(model, TOKENS, skip_layers=(1, 1), keep_ratio=1.0)
    images = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    features = clip.encode_lower(images)
    assert features.shape[1:] == (3, 4, 8)
    assert clip(features, LABELS[:2]).loss.equal(clip(images, LABELS[:2]).loss)


@pytest.mark.parametrize("name", ["convnext", "resnet"])
def test_half_precision_and_autocast(name):
    family = FAMILIES[name]
    clip = cut(family.make().bfloat16(), 2)
    clip(family.images().bfloat16(), LABELS).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in clip.trainable_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert cut(family.make().float(), 2)(family.images().float(), LABELS).loss.isfinite()


def test_lower_batch_norm_update_makes_features_stale():
    """A call of the model in training mode updates the batch norms below the cut."""
    model = resnet()
    clip, images = cut(model, 3), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    maps = clip.encode_lower(images)
    model.train().encode_image(images)
    with pytest.raises(RuntimeError, match="weights below the cut have changed"):
        clip(maps, LABELS[:3])
    clip.refresh()
    clip(clip.encode_lower(images), LABELS[:3])
