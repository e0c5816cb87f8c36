"""Transformers of every family: the step equals the reference at every cut."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from hugging_face_models import SMALL, hugging_face_clip, metaclip_2, patches_of, siglip, siglip_2
from models import (
    TEXT,
    VISION,
    openai_clip,
    openai_models,
    random_weights,
    tiny_batch,
    tiny_clip,
    tiny_coca,
    tiny_tokens,
)
from reference_step import LOSS, assert_matches_reference_step
from torch import nn

import skipkernels as sk
from skipkernels import reference
from skipkernels.towers import UnsupportedModel, attention

CLASSES = 7


def with_encoder(tmp_path: Path, config: transformers.PretrainedConfig, pooler: str, projection: str = "linear"):
    config.save_pretrained(tmp_path)
    text = {
        "hf_model_name": str(tmp_path),
        "hf_model_pretrained": False,
        "hf_pooler_type": pooler,
        "hf_proj_type": projection,
    }
    torch.manual_seed(0)
    return random_weights(open_clip.CustomTextCLIP(12, VISION, text))


def encoder_tokens(padding: int = 1) -> torch.Tensor:
    tokens = torch.full((CLASSES, 20), padding)
    for i, row in enumerate(tokens):
        row[: 4 + i % 4] = torch.tensor([0, 5, *range(10 + i, 11 + i + i % 4), 2])
    return tokens


# ---- one step per family ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 1, 3, (2, 1)], ids=lambda skip: f"skip{skip}")
@pytest.mark.parametrize(
    "make",
    [
        openai_clip,
        hugging_face_clip,
        lambda: hugging_face_clip(end=59, activation="gelu"),
        lambda: hugging_face_clip(attn_implementation="eager").float(),  # its softmax is in fp32
        siglip,
        lambda: siglip(attn_implementation="eager").float(),
        metaclip_2,
        siglip_2,
        tiny_coca,
        lambda: tiny_coca(correct=True),
    ],
    ids=[
        "openai",
        "hf",
        "hf_eos",
        "hf_eager",
        "siglip",
        "siglip_eager",
        "metaclip_2",
        "siglip_2",
        "coca",
        "coca_correct",
    ],
)
def test_step_equals_reference(make, skip):
    model = make()
    images, labels = tiny_batch(3, CLASSES, model.logit_scale.dtype)
    tokens = tiny_tokens(CLASSES, context=76 if isinstance(model, open_clip.CoCa) else 77)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=1.0)
    assert_matches_reference_step(clip, images, tokens, labels)
    assert clip.reductions["text.fused_block"].enabled and clip.reductions["image.fused_block"].enabled
    if not type(model).__name__.startswith("Siglip"):
        assert clip.reductions["text.text_crop"].enabled and clip.reductions["text.shared_prefix"].enabled


SIGLIP_TEXT = {"pool_type": "last", "no_causal_mask": True}


@pytest.mark.parametrize(
    "make", [siglip, siglip_2, lambda: tiny_clip(family=open_clip.CustomTextCLIP, text=SIGLIP_TEXT)]
)
def test_siglip_text_last_block_computes_one_query(make, monkeypatch):
    calls, pooled = [], attention.pooled

    def recorded(query, key_value, **options):
        calls.append((len(query), len(key_value)))
        return pooled(query, key_value, **options)

    clip = sk.SkipCLIP(make(), tiny_tokens(CLASSES), skip_layers=1, keep_ratio=1.0)
    assert clip.reductions["text.pooled_last_block"].enabled
    monkeypatch.setattr(attention, "pooled", recorded)
    clip.encode_classes(torch.arange(CLASSES))
    assert calls == [(CLASSES, CLASSES * 77)]


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (16, 40)])
def test_siglip_2_makes_patches_as_its_processor(size):
    model = siglip_2()
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    clip = sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)
    with torch.no_grad():
        expected = model.get_image_features(**patches_of(images, padding=3)).pooler_output
        torch.testing.assert_close(clip.encode_image(images), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 24, 24\]"):
        clip.encode_image(images[..., :-1])


@pytest.mark.parametrize("make", [openai_clip, hugging_face_clip, siglip, tiny_coca, lambda: tiny_coca(correct=True)])
def test_pair_loss_of_other_captions_equals_reference(make):
    model = make()
    images, captions = tiny_batch(3, CLASSES, model.logit_scale.dtype)[0], tiny_tokens(5)[2:]
    captions[:, 1] = torch.tensor([7, 8, 9])  # they share only the start of text
    if isinstance(model, open_clip.CoCa):
        captions = captions[:, :76]
    check_pair_loss(sk.SkipCLIP(model, captions[:1].repeat(2, 1), skip_layers=1), images, captions)


def check_pair_loss(clip, images, captions):
    encoded = clip.images.tower.reference_forward(images), clip.texts.tower.reference_forward(captions)
    expected = reference.contrastive_loss(*encoded, clip.model.logit_scale.exp())
    torch.testing.assert_close(sk.pairs.pair_loss(clip, images, captions), expected, rtol=LOSS[images.dtype], atol=0)


@pytest.mark.parametrize(
    ("config", "pooler", "projection"),
    [
        (transformers.RobertaConfig, "mean_pooler", "mlp"),
        (transformers.XLMRobertaConfig, "mean_pooler", "linear"),
        (transformers.XLMRobertaConfig, "cls_pooler", "linear"),
        (transformers.BertConfig, "cls_last_hidden_state_pooler", "linear"),
    ],
    ids=["roberta", "xlm_roberta", "xlm_roberta_cls", "bert"],
)
@pytest.mark.parametrize("skip", [0, 2, (1, 3)], ids=lambda skip: f"skip{skip}")
def test_hf_text_encoder_step(tmp_path, config, pooler, projection, skip):
    chosen = config(**SMALL, vocab_size=60, max_position_embeddings=30, pad_token_id=1, type_vocab_size=1)
    model = with_encoder(tmp_path, chosen, pooler, projection).eval()
    check_encoder(model, skip)


@pytest.mark.parametrize("skip", [0, 2, (1, 3)], ids=lambda skip: f"skip{skip}")
@pytest.mark.parametrize("kind", ["mt5", "nllb"])
def test_translation_encoder_step(tmp_path, kind, skip):
    if kind == "mt5":
        config = transformers.MT5Config(
            d_model=24, d_kv=8, d_ff=48, num_layers=3, num_heads=3, vocab_size=60, pad_token_id=1
        )
        model = with_encoder(tmp_path, config, "mean_pooler")
    else:
        config = transformers.M2M100Config(
            d_model=24, encoder_layers=3, decoder_layers=1, encoder_attention_heads=3, decoder_attention_heads=3,
            encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, max_position_embeddings=30, pad_token_id=1,
            encoder_layerdrop=0.0,
        )  # fmt: skip
        model = with_encoder(tmp_path, config, "cls_pooler")
    check_encoder(model.eval(), skip)


def check_encoder(model, skip):
    tokens, (images, labels) = encoder_tokens(), tiny_batch(3, CLASSES)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=1.0)
    assert clip.texts.templates[0].tokens.shape[1] == 7 < tokens.shape[1]
    assert "runs its own forward" in clip.reductions["text.fused_block"].reason
    assert_matches_reference_step(clip, images, tokens, labels)
    check_pair_loss(clip, images, tokens[[4, 0, 1]])


def test_encoder_with_layerdrop_raises(tmp_path):
    config = transformers.M2M100Config(
        d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3, decoder_attention_heads=3,
        vocab_size=60, pad_token_id=1, encoder_layerdrop=0.1,
    )  # fmt: skip
    model = with_encoder(tmp_path, config, "cls_pooler")
    with pytest.raises(UnsupportedModel, match="encoder_layerdrop"):
        sk.SkipCLIP(model, encoder_tokens(), skip_layers=1)


# ---- unusual masks and positions -------------------------------------------------------------------------------


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("kind", ["padding_inside", "full"])
def test_coca_unusual_padding(kind, correct):
    model, tokens, (images, labels) = tiny_coca(correct), tiny_tokens(CLASSES, context=76), tiny_batch(3, CLASSES)
    if kind == "full":
        tokens[2, 2:] = torch.arange(74) % 50 + 1
    else:
        tokens[2, 2] = 0  # "!" of open_clip's vocabulary
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    full_and_correct = kind == "full" and correct
    assert (clip.reductions["text.shared_prefix"].enabled) == full_and_correct
    assert_matches_reference_step(clip, images, tokens, labels)


@pytest.mark.parametrize("skip", [0, 1])
def test_sin_cos_positions_never_train(skip):
    model, tokens, (images, labels) = tiny_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    model.visual = open_clip.CLIP(12, {**VISION, "pos_embed_type": "sin_cos_2d"}, TEXT).visual.double()
    assert not model.visual.positional_embedding.requires_grad
    for _ in range(2):  # the second SkipCLIP gets a model that the first one changed
        clip = sk.SkipCLIP(model, tokens, skip_layers=1)
        clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=1.0)
    assert not model.visual.positional_embedding.requires_grad
    assert_matches_reference_step(clip, images, tokens, labels)


def test_padding_mask_only():
    text = {"no_causal_mask": True, "pool_type": "argmax"}
    model, tokens = tiny_clip(family=open_clip.CustomTextCLIP, text=text), tiny_tokens(CLASSES)
    model.text.use_pad_mask = True  # no config has it
    images, labels = tiny_batch(3, CLASSES)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert clip.reductions["text.text_crop"].enabled and clip.texts.templates[0].tokens.shape[1] < 10
    assert "later ones" in clip.reductions["text.shared_prefix"].reason
    assert_matches_reference_step(clip, images, tokens, labels)


# ---- altered models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [openai_clip, hugging_face_clip, siglip, tiny_coca], ids=["openai", "hf", "siglip", "coca"]
)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_block_hook_is_followed(make, tower):
    model = make()
    images, labels = tiny_batch(3, CLASSES, model.logit_scale.dtype)
    tokens = tiny_tokens(CLASSES, context=76 if isinstance(model, open_clip.CoCa) else 77)
    plain = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    block = getattr(plain, f"{tower}s").tower.blocks[2]
    norm = next(module for module in block.modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_hook(lambda mod, args, out: out * 1.01)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert "hooks" in clip.reductions[f"{tower}.fused_block"].reason
    assert_matches_reference_step(clip, images, tokens, labels)


@pytest.mark.parametrize("make", [openai_clip, hugging_face_clip, siglip], ids=["openai", "hf", "siglip"])
def test_replaced_activation_is_followed(make):
    model, name = make(), "activation_fn"
    mlps = ("text_model.encoder.layers.2.mlp", "vision_model.encoder.layers.1.mlp")
    if make is openai_clip:
        mlps, name = ("transformer.resblocks.2.mlp", "visual.transformer.resblocks.1.mlp"), "gelu"
    for mlp in mlps:
        setattr(model.get_submodule(mlp), name, nn.SiLU())
    tokens, (images, labels) = tiny_tokens(CLASSES), tiny_batch(3, CLASSES, model.logit_scale.dtype)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert (
        "SiLU" in clip.reductions["text.fused_block"].reason and "SiLU" in clip.reductions["image.fused_block"].reason
    )
    assert_matches_reference_step(clip, images, tokens, labels)


def test_end_of_text_is_read_from_model_not_config():
    model, tokens, (images, labels) = hugging_face_clip(end=55), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    tokens[tokens == 59] = 55  # not the largest id
    model.text_model.config.eos_token_id = 2
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert_matches_reference_step(clip, images, tokens, labels)


def test_end_of_text_of_metaclip_2_is_never_the_largest_id():
    model, tokens, (images, labels) = metaclip_2(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    model.text_model.eos_token_id, tokens[tokens == 59] = 2, 2
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert clip.texts.templates[0].pooled.min() > 0
    assert_matches_reference_step(clip, images, tokens, labels)


def test_attention_with_unusual_scale_is_not_fused():
    model, tokens, (images, labels) = hugging_face_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    model.vision_model.encoder.layers[1].self_attn.scale = 0.1
    model.text_model.encoder.layers[2].self_attn.scale = 0.1
    with pytest.warns(UserWarning, match="a block's attention is causal or has an unusual scale"):
        clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert_matches_reference_step(clip, images, tokens, labels)


@pytest.mark.parametrize(
    ("make", "part"),
    [(openai_clip, "transformer"), (hugging_face_clip, "text_model.encoder"), (siglip, "vision_model")],
)
def test_altered_tower_raises(make, part):
    model = make()
    tower = model.get_submodule(part)
    tower.forward = tower.forward
    with pytest.raises(UnsupportedModel, match=r"has a replaced forward\(\), and SkipCLIP does not call this module"):
        sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1)


def test_openai_replaced_mask_is_followed():
    model, tokens, (images, labels) = openai_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES, torch.float32)
    for block in model.transformer.resblocks:
        block.attn_mask = torch.zeros(77, 77)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert "not the causal one" in clip.reductions["text.shared_prefix"].reason
    assert not clip.reductions["text.text_crop"].enabled
    assert_matches_reference_step(clip, images, tokens, labels)


def test_openai_half_precision_norms_in_fp32():
    """The model is that of `clip.load` on a GPU."""
    model = openai_clip()
    openai_models().convert_weights(model)
    tokens, (images, labels) = tiny_tokens(CLASSES), tiny_batch(3, CLASSES, torch.float32)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1)
    out = clip(images, labels)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.trainable_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_open_clip_half_precision_norms_in_fp32(dtype):
    """The model is that of `open_clip.create_model(precision="bf16")`; bf16 leaves two or three digits of the loss."""
    exact, tokens = tiny_clip(torch.float32), tiny_tokens(CLASSES)
    images, labels = tiny_batch(3, CLASSES, torch.float32)
    torch.manual_seed(0)
    model = open_clip.CLIP(12, VISION, TEXT, cast_dtype=dtype)
    model.load_state_dict(exact.state_dict())
    open_clip.model.convert_weights_to_lp(model, dtype)
    assert model.visual.ln_post.weight.dtype == torch.float32 != model.visual.conv1.weight.dtype
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert clip.reductions["image.fused_block"].enabled and clip.reductions["text.fused_block"].enabled
    loss = clip(images, labels).loss
    loss.backward()
    expected = sk.SkipCLIP(exact, tokens, skip_layers=1, keep_ratio=1.0)(images, labels).loss
    assert loss.item() == pytest.approx(expected.item(), rel=5e-2)
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in clip.trainable_parameters())
    assert clip.encode_lower(images.to(dtype)).dtype == dtype
    torch.testing.assert_close(clip.predict(images), clip.predict(clip.encode_lower(images)))


def test_old_transformers_raises(monkeypatch):
    model = siglip()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.6")
    with pytest.raises(UnsupportedModel, match="SiglipModel needs transformers 5 or later; got 4.57.6"):
        sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)


def test_parameter_on_both_sides_of_cut_raises():
    model = tiny_clip()
    blocks = model.visual.transformer.resblocks
    blocks[2].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    with pytest.raises(UnsupportedModel, match=r"resblocks.0.mlp.c_fc.weight is used on both sides of the cut"):
        sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)
    sk.SkipCLIP(model, tiny_tokens(4), skip_layers=0)


def test_unsupported_models_raise():
    with pytest.raises(UnsupportedModel, match=r"parallel attentional pooler leaves an axis"):
        sk.SkipCLIP(tiny_coca(attentional_pool="parallel"), tiny_tokens(4), skip_layers=1)
    with pytest.raises(UnsupportedModel, match=r"must be one of open_clip.model.CLIP, .*; got torch.nn"):
        sk.SkipCLIP(nn.Linear(2, 2), tiny_tokens(4), skip_layers=1)
    bert = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=60))
    with pytest.raises(UnsupportedModel, match="got transformers.models.bert.modeling_bert.BertModel"):
        sk.SkipCLIP(bert, tiny_tokens(4), skip_layers=1)
