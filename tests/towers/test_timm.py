"""Transformers of timm as image towers: the step equals the reference at every cut, or the model is refused."""

from __future__ import annotations

from functools import partial

import pytest
import timm_models
import torch
from reference_step import assert_matches_reference_step
from timm.layers import HybridEmbed, LayerNorm, RmsNorm
from timm.models.eva import Eva
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm_models import LABELS, TOKENS, Family, cut, each_cut, timm_clip
from torch import nn

from skipkernels.towers import UnsupportedModel

SHAPE = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 12}
CLIP = {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5)}
SIGLIP = {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh", "num_classes": 0}
ROTARY = {"use_rot_pos_emb": True, "global_pool": "token"}
EVA02 = {**ROTARY, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
PE = {**ROTARY, "attn_type": "rope", "global_pool": "map", "attn_pool_num_heads": 4, "use_pre_transformer_norm": True}
GRID = {"ref_feat_shape": (4, 4), "rope_grid_offset": 1.0, "rope_grid_indexing": "xy"}


def vit(**rest) -> nn.Module:
    return timm_clip(VisionTransformer(**{**SHAPE, **rest}))


def projected(trunk: nn.Module) -> nn.Module:
    """Model with timm_proj="linear", an option of open_clip configs."""
    return timm_clip(trunk, head=nn.Sequential(nn.Dropout(0.0), nn.Linear(24, 12, bias=False)))


def mobile_clip() -> nn.Module:
    stem = ConvStem(depth=2, channels=(8, 24), stride=(4, 2), kernel_size=(4, 2), padding=0, act_layer=nn.GELU)
    return vit(patch_size=1, no_embed_class=True, embed_layer=partial(HybridEmbed, backbone=stem, proj=False))


def eva(**rest) -> nn.Module:
    return timm_clip(Eva(**{**SHAPE, **rest}))


def relative(**rest) -> nn.Module:
    return timm_clip(VisionTransformerRelPos(**{**SHAPE, **rest}))


FUSED = {
    "clip": Family(partial(vit, **CLIP), 16, 3),
    "layer_scale": Family(partial(vit, init_values=0.1, act_layer="quick_gelu", reg_tokens=2), 16, 3),
    "siglip": Family(lambda: projected(VisionTransformer(**{**SHAPE, **SIGLIP})), 16, 3),
    "mean": Family(partial(vit, global_pool="avg", class_token=False), 16, 3),
    "mobile_clip": Family(mobile_clip, 16, 3),
}
FUSED |= {
    "qk_norm": Family(partial(vit, qk_norm=True), 16, 3),
    "eva": Family(partial(eva, global_pool="token"), 16, 3),
    "eva02": Family(partial(eva, **EVA02), 16, 3),
    "perception_encoder": Family(partial(eva, **PE, **GRID), 16, 3),
    "rope_dinov3": Family(partial(eva, **ROTARY, attn_type="rope", rope_type="dinov3"), 16, 3),
    "mrope": Family(partial(eva, **ROTARY, attn_type="rope", rope_type="mrope", rope_mrope_section=(2, 1, 1)), 16, 3),
}
NOT_FUSED = {
    "eva_post_norm": Family(partial(eva, global_pool="token", use_post_norm=True), 16, 3),
    "rope_mixed": Family(partial(eva, **ROTARY, rope_type="mixed"), 16, 3),
    "relpos": Family(partial(relative, global_pool="avg"), 16, 3),
    "relpos_bias": Family(partial(relative, global_pool="token", class_token=True, rel_pos_type="bias"), 16, 3),
}


# The other families have the blocks of one of these, with other positions, norms or pooling.
EACH_CUT = ("clip", "siglip", "mobile_clip", "eva", "eva02", "perception_encoder", "relpos")


@each_cut(FUSED | NOT_FUSED, variants=(FUSED | NOT_FUSED).keys() - EACH_CUT)
def test_step_equals_reference(family, skip):
    reductions = timm_models.assert_matches_reference(family, skip).reductions
    assert (reductions["image.fused_block"].enabled) == (family in FUSED.values())
    if skip < family.depth:
        pools = family in FUSED.values() and family not in (FUSED["siglip"], FUSED["mean"], FUSED["perception_encoder"])
        assert (reductions["image.pooled_last_block"].enabled) == pools


@pytest.mark.parametrize("family", (FUSED | NOT_FUSED).values(), ids=FUSED | NOT_FUSED)
def test_features_are_constant(family):
    for skip in (1, family.depth):
        timm_models.assert_features_are_constant(family, skip)


@pytest.mark.parametrize("skip", [0, 1, 3], ids=lambda skip: f"skip{skip}")
def test_stem_batch_norms_update_above_cut_only(skip):
    timm_models.assert_batch_norms_update_above_cut_only(FUSED["mobile_clip"], skip)


@pytest.mark.parametrize(
    ("make", "skip"),
    [
        (partial(vit, drop_path_rate=0.5), 2),
        (partial(vit, patch_size=2, patch_drop_rate=0.5), 0),
        (partial(vit, attn_drop_rate=0.5), 2),
        (partial(eva, patch_size=2, global_pool="token", patch_drop_rate=0.5), 0),
    ],
    ids=["drop_path", "patches", "attention", "eva_patches"],
)
def test_training_draws_as_model(make, skip):
    timm_models.assert_draws_as_the_model(Family(make, 16, 3), skip)


def test_drop_path_reason_has_remedy():
    reason = cut(vit(drop_path_rate=0.1), 1).reductions["image.fused_block"].reason
    assert "drop path" in reason and "set their rates to 0" in reason
    model = vit(drop_path_rate=0.1)
    for module in model.visual.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    assert cut(model, 1).reductions["image.fused_block"].enabled


@pytest.mark.parametrize("make", [vit, partial(eva, **EVA02), mobile_clip], ids=["vit", "eva02", "mobile_clip"])
def test_model_checkpointing_changes_nothing(make):
    model = make()
    model.visual.set_grad_checkpointing(True)
    images = Family(make, 16, 3).images()
    for skip in (0, 2):
        assert_matches_reference_step(cut(model, skip), images, TOKENS, LABELS)


def test_images_of_another_size():
    model = vit(patch_size=4, dynamic_img_size=True)
    clip = cut(model, 1)
    assert_matches_reference_step(clip, torch.randn(3, 3, 24, 8, dtype=torch.float64), TOKENS, LABELS)
    resized = vit()
    resized.visual.set_input_size(24)
    assert_matches_reference_step(cut(resized, 1), torch.randn(3, 3, 24, 24, dtype=torch.float64), TOKENS, LABELS)


def test_learned_rotary_positions_are_below_cut():
    model = eva(**ROTARY, rope_type="mixed")
    for skip in (0, 1, 3):
        clip = cut(model, skip)
        clip(Family(eva, 16, 3).images(), LABELS).loss.backward()
        freqs = model.visual.trunk.rope.freqs
        assert freqs.requires_grad == (freqs.grad is not None) == (skip == 0)
        model.zero_grad()


# ---- altered models ------------------------------------------------------------------------------------------------


def _set(owner: nn.Module, name: str, value) -> None:
    setattr(owner, name, value.double() if isinstance(value, nn.Module) else value)


@pytest.mark.parametrize(
    "alter",
    [
        lambda block: block.register_forward_hook(lambda mod, args, out: out * 1.01),
        lambda block: block.mlp.fc1.register_full_backward_hook(lambda mod, d_in, d_out: None),
        lambda block: _set(block.mlp, "act", nn.SiLU()),
        lambda block: _set(block, "ls1", nn.Linear(24, 24)),
        lambda block: _set(block.attn, "norm", RmsNorm(24)),
        lambda block: _set(block.attn, "gate", nn.Linear(24, 24)),
        lambda block: _set(block.norm1, "forward", lambda x: x),
        lambda block: _set(block.attn, "forward", lambda x, **rest: 2 * x),
        lambda block: _set(block.norm1, "weight", None),
        lambda block: torch.nn.utils.parametrizations.weight_norm(block.mlp.fc1),
    ],
    ids=["hook", "backward_hook", "silu", "scale", "norm", "gate", "forward", "attention", "weight", "weight_norm"],
)
@pytest.mark.parametrize("place", [0, 2], ids=["below", "above"])
def test_altered_block_is_not_fused(alter, place):
    model = vit()
    alter(model.visual.trunk.blocks[place])
    clip = cut(model, 1)
    assert not clip.reductions["image.fused_block"].enabled
    assert_matches_reference_step(clip, Family(vit, 16, 3).images(), TOKENS, LABELS)


@pytest.mark.parametrize("rest", [{"block_fn": ParallelScalingBlock}, {"attn_layer": "diff"}], ids=["parallel", "diff"])
def test_other_block_types_are_not_fused(rest):
    family = Family(partial(vit, **rest), 16, 3)
    assert not timm_models.assert_matches_reference(family, 1).reductions["image.fused_block"].enabled


@pytest.mark.parametrize(
    "alter",
    [
        lambda trunk: trunk.register_forward_hook(lambda mod, args, out: out + 1),
        lambda trunk: trunk.blocks.register_forward_hook(lambda mod, args, out: out * 1.5),
        lambda trunk: setattr(trunk, "forward_features", lambda x, **rest: trunk.patch_embed(x)),
    ],
    ids=["trunk_hook", "blocks_hook", "forward_features"],
)
def test_altered_trunk_raises(alter):
    model = vit()
    alter(model.visual.trunk)
    with pytest.raises((UnsupportedModel, RuntimeError), match="does not call this module|of an image differ"):
        cut(model, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: timm_clip(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=12)),
            "must be one of Vision.*; got timm's ResNet",
        ),
        (partial(relative, shared_rel_pos=True), "shared_rel_pos"),
        (partial(eva, **ROTARY, patch_drop_rate=0.5), "patch_drop_rate"),
        (partial(eva, **ROTARY, dynamic_img_size=True), "dynamic_img_size"),
        (partial(eva, **ROTARY, rope_shift_coords=0.1), "rope_shift_coords"),
    ],
    ids=["resnet", "shared", "patches", "dynamic", "augmented"],
)
def test_models_without_exact_cut_raise(make, message):
    with pytest.raises(UnsupportedModel, match=message):
        cut(make(), 1)


@pytest.mark.parametrize("make", [vit, partial(eva, **EVA02)], ids=["vit", "eva02"])
def test_half_precision_and_autocast(make):
    images = Family(make, 16, 3).images()
    clip = cut(make().bfloat16(), 1)
    clip(images.bfloat16(), LABELS).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in clip.trainable_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert cut(make().float(), 1)(images.float(), LABELS).loss.isfinite()
