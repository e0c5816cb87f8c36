"""Towers of open_clip 4: modern text transformers, ModernBERT, NaFlexVit, and models that are refused."""

from __future__ import annotations

import open_clip
import pytest
import torch
import transformers
from models import TEXT, VISION, random_weights, tiny_batch, tiny_tokens
from open_clip.hf_configs import arch_dict
from reference_step import assert_matches_reference_step
from timm.models.naflexvit import NaFlexVit
from timm_models import Family, assert_features_are_constant, assert_matches_reference, each_cut, timm_clip

import skipkernels as sk
from skipkernels.towers import UnsupportedModel
from skipkernels.towers.registry import _REFUSED

CLASSES = 7
needs_modern_text = pytest.mark.skipif(
    not hasattr(open_clip.transformer, "ModernTextTransformer"), reason="open_clip 3 has no modern text tower"
)


# ---- modern text towers ----------------------------------------------------------------------------------------

MODERN = {
    "eos": {"pool_type": "eos"},
    "gated": {"pool_type": "eos", "attn_gated": True, "qk_norm": True, "attention_bias": True, "mlp_bias": True},
    "sandwich": {"pool_type": "argmax", "norm_placement": "sandwich", "ls_init_value": 0.3, "mlp_type": "relu2"},
    "map": {"pool_type": "map", "attention_mode": "bidirectional", "qk_norm": True, "attn_gated": True},
    "mean": {"pool_type": "mean", "pos_embed": "none", "pre_norm": True, "norm_type": "layernorm"},
    "values": {"pool_type": "eos", "value_residual": True},
    "values_map": {"pool_type": "map", "value_residual": True, "attention_mode": "bidirectional"},
}


def modern(**options) -> torch.nn.Module:
    """Model with padding 0, start of text 57 and end of text 59."""
    text = {"context_length": 30, "mlp_ratio": 2.5, "eos_id": 59, "pad_id": 0, "bos_id": 57, "variable_text": True}
    torch.manual_seed(0)
    return random_weights(open_clip.CustomTextCLIP(12, VISION, {**TEXT, **text, "text_arch": "modern", **options}))


@needs_modern_text
@pytest.mark.parametrize("skip", [0, 1, 3], ids=lambda skip: f"skip{skip}")
@pytest.mark.parametrize("name", MODERN)
def test_modern_text_step(name, skip):
    model, tokens, (images, labels) = modern(**MODERN[name]), tiny_tokens(CLASSES, context=30), tiny_batch(3, CLASSES)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=1.0)
    assert clip.texts.tower.tokens.shape[1] < 10 and clip.reductions["text.text_crop"].enabled
    assert "runs its own forward" in clip.reductions["text.fused_block"].reason
    assert_matches_reference_step(clip, images, tokens, labels)
    rows = clip.texts.templates[0].row_count  # the prefix is stored once where a token sees no later ones
    assert (rows < clip.texts.tower.tokens.numel()) == (name in ("eos", "gated", "sandwich", "values"))


@needs_modern_text
@pytest.mark.parametrize("name", ["eos", "map"])
def test_modern_text_unusual_prompts(name):
    """Prompts without an end of text, with words behind it, with padding inside, and of padding only."""
    model, tokens, (images, labels) = modern(**MODERN[name]), tiny_tokens(CLASSES, context=30), tiny_batch(3, CLASSES)
    tokens[0][tokens[0] == 59] = 0
    tokens[1, 12:15] = torch.tensor([7, 59, 8])
    tokens[2, 3] = 0
    tokens[3] = 0
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert clip.texts.tower.tokens.shape[1] == 15
    assert_matches_reference_step(clip, images, tokens, labels)


@needs_modern_text
def test_modern_text_without_padding_id():
    """Without an id of padding all tokens are seen, and nothing is cropped."""
    model, tokens = modern(pad_id=None, **MODERN["map"]), tiny_tokens(CLASSES, context=30)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert clip.texts.tower.tokens.shape[1] == 30
    assert_matches_reference_step(clip, *tiny_batch(3, CLASSES)[:1], tokens, tiny_batch(3, CLASSES)[1])


@needs_modern_text
def test_register_tokens_are_refused():
    with pytest.raises(UnsupportedModel, match="register tokens"):
        sk.SkipCLIP(modern(reg_tokens=2), tiny_tokens(CLASSES, context=30), skip_layers=1)


# ---- ModernBERT ------------------------------------------------------------------------------------------------


@pytest.mark.skipif("modernbert" not in arch_dict, reason="open_clip 3 has no ModernBERT")
@pytest.mark.parametrize("skip", [0, 1, 3, 4], ids=lambda skip: f"skip{skip}")
def test_modern_bert_step(skip, tmp_path):
    """Windows of two tokens on both sides: the padding of the shorter prompts has only padding in its window."""
    config = transformers.ModernBertConfig(
        hidden_size=24, intermediate_size=36, num_hidden_layers=4, num_attention_heads=3, vocab_size=60,
        max_position_embeddings=30, local_attention=4, global_attn_every_n_layers=3, pad_token_id=0, cls_token_id=57,
        sep_token_id=59, bos_token_id=57, eos_token_id=59,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False, "hf_proj_type": "linear"}
    torch.manual_seed(0)
    model = random_weights(open_clip.CustomTextCLIP(12, VISION, {**text, "hf_pooler_type": "cls_pooler"})).eval()
    tokens, (images, labels) = tiny_tokens(CLASSES, context=30), tiny_batch(3, CLASSES, torch.float32)
    tokens[1, 3:20] = torch.arange(6, 23)
    clip = sk.SkipCLIP(model.float(), tokens, skip_layers=(1, skip), keep_ratio=1.0)  # its rotations are in fp32
    assert clip.texts.tower.tokens.shape[1] == 20
    assert_matches_reference_step(clip, images, tokens, labels)


# ---- NaFlexVit -------------------------------------------------------------------------------------------------


def naflex(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 12}
    size |= {"pos_embed_grid_size": (2, 2), "global_pool": "avg"}
    return timm_clip(NaFlexVit(**{**size, **options}))


NAFLEX = {
    "avg": Family(naflex, 16, 3),
    "map": Family(lambda: naflex(global_pool="map", swiglu_mlp=True, reg_tokens=1), 16, 3),
    "interpolated": Family(lambda: naflex(pos_embed_grid_size=(3, 3), pos_embed="factorized"), 16, 3),
    "token": Family(lambda: naflex(class_token=True, global_pool="token", reg_tokens=1, pre_norm=True), 16, 3),
}


@each_cut(NAFLEX, variants=("interpolated",))
def test_naflex_step(family, skip):
    clip = assert_matches_reference(family, skip)
    assert clip.reductions["image.fused_block"].enabled
    token = family.make().visual.trunk.global_pool == "token"
    assert clip.reductions["image.pooled_last_block"].enabled == (token and skip < 3)


@each_cut(NAFLEX, lowest=1, variants=NAFLEX)
def test_naflex_features_are_constant(family, skip):
    assert_features_are_constant(family, skip)


def test_naflex_patch_dropout_draws_as_the_model():
    model, images = naflex(patch_drop_rate=0.5).train(), tiny_batch(3, CLASSES)[0]
    clip = sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=(0, 1))
    embeddings = []
    for encode in (model.encode_image, clip.encode_image):
        torch.manual_seed(3)
        embeddings.append(encode(images))
    torch.testing.assert_close(*embeddings, rtol=1e-9, atol=1e-9)
    clip = sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1)
    assert clip.encode_lower(images).shape[1] == 4


def test_naflex_with_rotary_positions_is_refused():
    with pytest.raises(UnsupportedModel, match="rotary positions"):
        sk.SkipCLIP(naflex(rope_type="axial"), tiny_tokens(CLASSES), skip_layers=1)


# ---- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", _REFUSED)
def test_models_without_two_known_towers_are_refused(path):
    module, _, kind = path.rpartition(".")
    model = torch.nn.Module()
    model.__class__ = type(kind, (torch.nn.Module,), {"__module__": module})
    with pytest.raises(UnsupportedModel, match=f"{kind} is not handled: it"):
        sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)
