"""Text towers of open_clip 4: modern text transformers, ModernBERT."""

from __future__ import annotations

import open_clip
import pytest
import torch
import transformers
from open_clip.hf_configs import arch_dict
from open_clip.transformer import ResidualAttentionBlock as Block
from torch import nn

import skipkernels as sk
from skipkernels.towers.alterations import submodules
from skipkernels.towers.base import UnsupportedModel
from skipkernels.towers.block import _fused_class
from skipkernels.towers.families import open_clip as open_clip_towers
from tests.models import TEXT, VISION, random_weights, tiny_batch, tiny_clip, tiny_tokens
from tests.reference_step import assert_matches_reference_step
from tests.towers.families import CLASSES, with_encoder

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
    images, labels = tiny_batch(3, CLASSES)
    assert_matches_reference_step(clip, images, tokens, labels)


@needs_modern_text
def test_register_tokens_are_refused():
    with pytest.raises(UnsupportedModel, match="register tokens"):
        sk.SkipCLIP(modern(reg_tokens=2), tiny_tokens(CLASSES, context=30), skip_layers=1)


# ---- ModernBERT ------------------------------------------------------------------------------------------------


def modern_bert() -> torch.nn.Module:
    """Windows of two tokens on both sides; in fp32, as its rotations are."""
    ids = {"pad_token_id": 0, "cls_token_id": 57, "sep_token_id": 59, "bos_token_id": 57, "eos_token_id": 59}
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 4, "num_attention_heads": 3}
    windows = {"local_attention": 4, "global_attn_every_n_layers": 3, "max_position_embeddings": 30, "vocab_size": 60}
    return with_encoder(transformers.ModernBertConfig(**sizes, **windows, **ids), "cls_pooler").float()


@pytest.mark.skipif("modernbert" not in arch_dict, reason="open_clip 3 has no ModernBERT")
@pytest.mark.parametrize("skip", [0, 1, 3, 4], ids=lambda skip: f"skip{skip}")
def test_modern_bert_step(skip):
    """The padding of the shorter prompts has only padding in its window."""
    tokens, (images, labels) = tiny_tokens(CLASSES, context=30), tiny_batch(3, CLASSES, torch.float32)
    tokens[1, 3:20] = torch.arange(6, 23)
    clip = sk.SkipCLIP(modern_bert(), tokens, skip_layers=(1, skip), keep_ratio=1.0)
    assert clip.texts.tower.tokens.shape[1] == 20
    assert_matches_reference_step(clip, images, tokens, labels)


# ---- attention of its blocks -----------------------------------------------------------------------------------------


def test_attention_of_open_clip_4_is_fused(monkeypatch):
    """Blocks of open_clip 4 call its own Attention with sequences first; older ones call PyTorch's."""
    model, (images, labels) = tiny_clip(), tiny_batch(3, CLASSES)

    class Attention(open_clip_towers.Attention):
        def forward(self, x, k_x=None, v_x=None, attn_mask=None):
            q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, -1)).unbind(-2)
            q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=self.scale)
            return self.out_drop(self.out_proj(out.transpose(1, 2).flatten(2)))

    def attention(self, q_x, k_x=None, v_x=None, attn_mask=None):
        return self.attn(q_x, attn_mask=None if attn_mask is None else attn_mask.to(q_x.dtype))

    monkeypatch.setattr(open_clip_towers, "Attention", Attention)
    monkeypatch.setitem(open_clip_towers._BLOCK_OF_OPEN_CLIP_4, "attn", submodules({"attn": (Attention,)})["attn"])
    monkeypatch.setattr(Block, "attention", attention)
    monkeypatch.setitem(_fused_class(Block, "fast")._methods, "attention", attention)
    for block in (*model.visual.transformer.resblocks, *model.transformer.resblocks):
        old = block.attn
        block.attn = Attention(old.embed_dim, old.num_heads).double()
        block.attn.load_state_dict(old.state_dict())
    clip = sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1, keep_ratio=1.0)
    assert all(reduction.enabled for reduction in clip.reductions.values())
    assert_matches_reference_step(clip, images, tiny_tokens(CLASSES), labels)
    model.visual.transformer.resblocks[2].attn.scale = 1.0
    with pytest.warns(UserWarning, match="a block's attention is scaled"):
        assert_matches_reference_step(clip, images, tiny_tokens(CLASSES), labels)
