"""Text and image transformers of every family: the step is the caller's own, whatever is cut off and left out."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from models import TEXT, VISION, openai_models, tiny_batch, tiny_clip, tiny_tokens
from own_step import assert_is_the_own_step
from torch import nn

import skipkernels as sk
from skipkernels.towers import UnsupportedModel

CLASSES = 7
SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


def random_weights(model: nn.Module) -> nn.Module:
    """Every parameter of its own, biases and norms too, in fp64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("logit"):
                parameter.fill_(2.5)
            else:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.double()


def openai_clip() -> nn.Module:
    """OpenAI's model, in fp32, as its norms compute."""
    torch.manual_seed(0)
    return random_weights(openai_models().CLIP(12, 16, 3, 64, 8, 77, 60, 16, 2, 3)).float()


def hugging_face_clip(end: int = 2, activation: str = "quick_gelu", **attention) -> nn.Module:
    text = {
        **SMALL,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 60,
        "eos_token_id": end,
        "projection_dim": 12,
    }
    vision = {**SMALL, "image_size": 16, "patch_size": 8, "projection_dim": 12}
    config = transformers.CLIPConfig(
        text_config={**text, "hidden_act": activation},
        vision_config={**vision, "hidden_act": activation},
        projection_dim=12,
    )
    torch.manual_seed(0)
    return random_weights(transformers.AutoModel.from_config(config, **attention))


def siglip(**attention) -> nn.Module:
    text = {**SMALL, "vocab_size": 60, "max_position_embeddings": 77, "projection_size": 24}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    return random_weights(transformers.AutoModel.from_config(config, **attention))


def coca(correct: bool = False, **vision) -> nn.Module:
    pooler = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True, "context_length": 76}
    decoder = {"context_length": 76, "width": 16, "heads": 2, "layers": 1, "vocab_size": 60}
    torch.manual_seed(0)
    width = VISION["width"] if vision else 12  # the poolers named in a config want the width of the tower
    model = open_clip.CoCa(width, decoder, text, {**VISION, **pooler, **vision})
    model.text.correct_cls_mask = correct  # no config has it
    return random_weights(model)


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


# ---- one module a tower, two projections, a class token behind the padding -------------------------------------


@pytest.mark.parametrize("skip", [0, 1, 2, 3, (0, 3), (2, 1)], ids=lambda skip: f"skip{skip}")
@pytest.mark.parametrize(
    "make",
    [
        openai_clip,
        hugging_face_clip,
        lambda: hugging_face_clip(end=59, activation="gelu"),
        lambda: hugging_face_clip(attn_implementation="eager").float(),  # its softmax is in fp32
        siglip,
        lambda: siglip(attn_implementation="eager").float(),
        coca,
        lambda: coca(correct=True),
    ],
    ids=["openai", "hf", "hf_eos", "hf_eager", "siglip", "siglip_eager", "coca", "coca_correct"],
)
def test_the_step_is_the_models_own(make, skip):
    model = make()
    images, labels = tiny_batch(3, CLASSES, model.logit_scale.dtype)
    tokens = tiny_tokens(CLASSES, context=76 if isinstance(model, open_clip.CoCa) else 77)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=1.0)
    assert_is_the_own_step(clip, images, tokens, labels)
    assert clip.reductions["text.fused_block"].enabled and clip.reductions["image.fused_block"].enabled
    if not type(model).__name__.startswith("Siglip"):
        assert clip.reductions["text.text_crop"].enabled and clip.reductions["text.shared_prefix"].enabled


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
def test_text_encoders_of_transformers(tmp_path, config, pooler, projection, skip):
    chosen = config(**SMALL, vocab_size=60, max_position_embeddings=30, pad_token_id=1, type_vocab_size=1)
    model = with_encoder(tmp_path, chosen, pooler, projection).eval()
    check_encoder(model, skip)


@pytest.mark.parametrize("skip", [0, 2, (1, 3)], ids=lambda skip: f"skip{skip}")
@pytest.mark.parametrize("kind", ["mt5", "nllb"])
def test_encoders_of_translators(tmp_path, kind, skip):
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
    assert clip._text.tokens.shape[1] == 7 < tokens.shape[1]
    assert "runs as your module" in clip.reductions["text.fused_block"].reason
    assert_is_the_own_step(clip, images, tokens, labels)


def test_an_encoder_that_skips_blocks_at_random_is_refused(tmp_path):
    config = transformers.M2M100Config(
        d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3, decoder_attention_heads=3,
        vocab_size=60, pad_token_id=1, encoder_layerdrop=0.1,
    )  # fmt: skip
    model = with_encoder(tmp_path, config, "cls_pooler")
    with pytest.raises(UnsupportedModel, match="encoder_layerdrop"):
        sk.SkipCLIP(model, encoder_tokens(), skip_layers=1)


# ---- prompts that are not as CoCa's mask expects them ----------------------------------------------------------


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("kind", ["padding_inside", "full"])
def test_coca_with_prompts_whose_padding_is_elsewhere(kind, correct):
    model, tokens, (images, labels) = coca(correct), tiny_tokens(CLASSES, context=76), tiny_batch(3, CLASSES)
    if kind == "full":
        tokens[2, 2:] = torch.arange(74) % 50 + 1
    else:
        tokens[2, 2] = 0  # "!" of open_clip's vocabulary
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    full_but_plain = kind == "full" and correct
    assert (clip.reductions["text.shared_prefix"].enabled) == full_but_plain
    assert_is_the_own_step(clip, images, tokens, labels)


@pytest.mark.parametrize("skip", [0, 1])
def test_sines_and_cosines_never_train(skip):
    model, tokens, (images, labels) = tiny_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    model.visual = open_clip.CLIP(12, {**VISION, "pos_embed_type": "sin_cos_2d"}, TEXT).visual.double()
    assert not model.visual.positional_embedding.requires_grad
    for _ in range(2):  # the second finds what the first has left
        clip = sk.SkipCLIP(model, tokens, skip_layers=1)
        clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=1.0)
    assert not model.visual.positional_embedding.requires_grad
    assert_is_the_own_step(clip, images, tokens, labels)


def test_a_mask_of_the_padding_alone():
    text = {"no_causal_mask": True, "pool_type": "argmax"}
    model, tokens = tiny_clip(family=open_clip.CustomTextCLIP, text=text), tiny_tokens(CLASSES)
    model.text.use_pad_mask = True  # no config has it
    images, labels = tiny_batch(3, CLASSES)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert clip.reductions["text.text_crop"].enabled and clip._text.tokens.shape[1] < 10
    assert "later ones" in clip.reductions["text.shared_prefix"].reason
    assert_is_the_own_step(clip, images, tokens, labels)


# ---- altered models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [openai_clip, hugging_face_clip, siglip, coca], ids=["openai", "hf", "siglip", "coca"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_hook_on_a_block_is_followed(make, tower):
    model = make()
    images, labels = tiny_batch(3, CLASSES, model.logit_scale.dtype)
    tokens = tiny_tokens(CLASSES, context=76 if isinstance(model, open_clip.CoCa) else 77)
    plain = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    block = getattr(plain, f"_{tower}").blocks[2]
    norm = next(module for module in block.modules() if isinstance(module, nn.LayerNorm))
    norm.register_forward_hook(lambda mod, args, out: out * 1.01)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert "hooks" in clip.reductions[f"{tower}.fused_block"].reason
    assert_is_the_own_step(clip, images, tokens, labels)


@pytest.mark.parametrize("make", [openai_clip, hugging_face_clip, siglip], ids=["openai", "hf", "siglip"])
def test_another_activation_is_followed(make):
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
    assert_is_the_own_step(clip, images, tokens, labels)


def test_end_of_text_is_the_models_and_not_the_configs():
    model, tokens, (images, labels) = hugging_face_clip(end=55), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    tokens[tokens == 59] = 55  # not the largest id
    model.text_model.config.eos_token_id = 2
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert_is_the_own_step(clip, images, tokens, labels)


def test_attention_with_a_scale_of_its_own_is_not_fused():
    model, tokens, (images, labels) = hugging_face_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    model.vision_model.encoder.layers[1].self_attn.scale = 0.1
    model.text_model.encoder.layers[2].self_attn.scale = 0.1
    with pytest.warns(UserWarning, match="1 of 3 blocks: a block's attention is causal by itself or has a scale"):
        clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert_is_the_own_step(clip, images, tokens, labels)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (openai_clip, "visual"),
        (openai_clip, "transformer"),
        (hugging_face_clip, "vision_model"),
        (hugging_face_clip, "text_model.encoder"),
        (siglip, "vision_model.encoder"),
        (siglip, "text_model"),
    ],
)
def test_a_tower_that_was_altered_is_refused(make, part):
    model = make()
    tower = model.get_submodule(part)
    forward = tower.forward

    def other(*args, **kwargs):
        out = forward(*args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out.flip(-1)
        name = "pooler_output" if "pooler_output" in out else "last_hidden_state"
        out[name] = out[name].flip(-1)
        return out

    tower.forward = other
    with pytest.raises(UnsupportedModel, match=r"has its own forward\(\), and SkipCLIP does not call this module"):
        sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1)


def test_openai_with_another_mask_is_followed():
    model, tokens, (images, labels) = openai_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES, torch.float32)
    for block in model.transformer.resblocks:
        block.attn_mask = torch.zeros(77, 77)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    assert "not the causal one" in clip.reductions["text.shared_prefix"].reason
    assert not clip.reductions["text.text_crop"].enabled
    assert_is_the_own_step(clip, images, tokens, labels)


def test_openai_in_half_precision_keeps_its_norms_in_fp32():
    """As `clip.load` leaves a model on a GPU."""
    model = openai_clip()
    openai_models().convert_weights(model)
    tokens, (images, labels) = tiny_tokens(CLASSES), tiny_batch(3, CLASSES, torch.float32)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1)
    out = clip(images, labels)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.trainable_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_open_clip_made_in_half_precision_keeps_its_norms_in_fp32(dtype):
    """As `open_clip.create_model(precision="bf16")` makes it. Three blocks of bf16 are worth two or three digits."""
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


def test_an_older_transformers_is_refused(monkeypatch):
    model = siglip()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.6")
    with pytest.raises(UnsupportedModel, match="SiglipModel is handled with transformers 5 or later; got 4.57.6"):
        sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)


def test_a_parameter_on_both_sides_of_the_cut_is_refused():
    model = tiny_clip()
    blocks = model.visual.transformer.resblocks
    blocks[2].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    with pytest.raises(UnsupportedModel, match=r"resblocks.0.mlp.c_fc.weight is used on both sides of the cut"):
        sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)
    sk.SkipCLIP(model, tiny_tokens(4), skip_layers=0)


@pytest.mark.parametrize("memory", ["fast", "min"])
def test_an_altered_block_with_little_memory(memory):
    """It runs as a module, which a checkpoint runs again in backward."""
    model, tokens, (images, labels) = tiny_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    for stack in (model.transformer, model.visual.transformer):
        stack.resblocks[2].ls_1 = nn.Hardtanh()
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0, memory=memory)
    assert "Hardtanh" in clip.reductions["image.fused_block"].reason
    assert_is_the_own_step(clip, images, tokens, labels)


def test_what_no_family_handles_is_refused():
    with pytest.raises(UnsupportedModel, match=r"parallel attentional pooler leaves an axis"):
        sk.SkipCLIP(coca(attentional_pool="parallel"), tiny_tokens(4), skip_layers=1)
    with pytest.raises(UnsupportedModel, match=r"must be one of open_clip.model.CLIP, .*; got torch.nn"):
        sk.SkipCLIP(nn.Linear(2, 2), tiny_tokens(4), skip_layers=1)
    bert = transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=60))
    with pytest.raises(UnsupportedModel, match="got transformers.models.bert.modeling_bert.BertModel"):
        sk.SkipCLIP(bert, tiny_tokens(4), skip_layers=1)
