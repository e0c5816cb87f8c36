"""Properties of one family: altered blocks, unusual prompts, masks, positions and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import torch
from timm.layers import RmsNorm
from torch import Tensor, nn

import skipkernels as sk
from skipkernels.towers import rows as rows_module
from tests.hugging_face_models import patches_of, siglip, siglip_2
from tests.models import (
    TEXT,
    VISION,
    half_precision_clip,
    openai_clip,
    openai_models,
    tiny_batch,
    tiny_clip,
    tiny_tokens,
)
from tests.reference_step import assert_matches_reference_step
from tests.timm_models import ROTARY, eva, vit
from tests.towers.families import CLASSES, FAMILIES, FUSED, LABELS, OPEN_CLIP, Family, like_another

VIT = like_another(vit)
DROP_PATH = like_another(partial(vit, drop_path_rate=0.1))


# ---- altered models, and unusual prompts of a model ------------------------------------------------------------------


def put(owner: nn.Module, name: str, value: Any) -> None:
    setattr(owner, name, value.double() if isinstance(value, nn.Module) else value)


def scaled(module: nn.Module, arguments: tuple, out: Tensor) -> Tensor:
    return out * 1.01


def text_hook(block: int) -> Callable[[nn.Module, Tensor], object]:
    return lambda model, tokens: model.transformer.resblocks[block].register_forward_hook(scaled)


def silu(*mlps: str, name: str) -> Callable[[nn.Module, Tensor], object]:
    return lambda model, tokens: [setattr(model.get_submodule(mlp), name, nn.SiLU()) for mlp in mlps]


def end_is(token: int) -> Callable[[nn.Module, Tensor], object]:
    """Another end of text than 59, which the text model says, and not its config."""

    def alter(model: nn.Module, tokens: Tensor) -> None:
        model.text_model.eos_token_id = token
        tokens[tokens == 59] = token

    return alter


def unusual_scale(model: nn.Module, tokens: Tensor) -> None:
    for blocks, number in ((model.vision_model.encoder.layers, 1), (model.text_model.encoder.layers, 2)):
        blocks[number].self_attn.scale = 0.1


def open_masks(model: nn.Module, tokens: Tensor) -> None:
    for block in model.transformer.resblocks:
        block.attn_mask = torch.zeros(77, 77)


def padding_inside(model: nn.Module, tokens: Tensor) -> None:
    tokens[2, 2] = 0  # "!" of open_clip's vocabulary


def full_prompt(model: nn.Module, tokens: Tensor) -> None:
    tokens[2, 2:] = torch.arange(74) % 50 + 1


def unusual_ends(model: nn.Module, tokens: Tensor) -> None:
    """Prompts without an end of text, with words behind it, with padding inside, and of padding only."""
    tokens[0][tokens[0] == 59] = 0
    tokens[1, 12:15] = torch.tensor([7, 59, 8])
    tokens[2, 3] = 0
    tokens[3] = 0


def no_drop_path(model: nn.Module, tokens: Tensor) -> None:
    for module in model.visual.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0


IN_OPENAI = silu("transformer.resblocks.2.mlp", "visual.transformer.resblocks.1.mlp", name="gelu")
IN_HUGGING_FACE = silu("text_model.encoder.layers.2.mlp", "vision_model.encoder.layers.1.mlp", name="activation_fn")
BOTH_FUSED = FUSED, "text.fused_block"
LAYOUT = PREFIX, CROP = "text.shared_prefix", "text.text_crop"
NOT_FUSED = (*BOTH_FUSED, PREFIX)
BIDIRECTIONAL = {"no_causal_mask": True, "pool_type": "argmax"}
PAD_MASK = Family(lambda: tiny_clip(family=open_clip.CustomTextCLIP, text=BIDIRECTIONAL))

# Family, what is done to its model and its prompts, and reductions that are then off, with words of the reason.
Row = tuple[Family, Callable[[nn.Module, Tensor], object], dict[str, str]]


def timm_block(alter: Callable[[nn.Module], object], words: str, number: int = 2) -> Row:
    return VIT, lambda model, tokens: alter(model.visual.trunk.blocks[number]), {FUSED: words}


ALTERED: dict[str, Row] = {
    "openai silu": (FAMILIES["openai"], IN_OPENAI, dict.fromkeys(NOT_FUSED, "SiLU")),
    "hf silu": (FAMILIES["hf"], IN_HUGGING_FACE, dict.fromkeys(NOT_FUSED, "SiLU")),
    "siglip silu": (FAMILIES["siglip"], IN_HUGGING_FACE, dict.fromkeys(BOTH_FUSED, "SiLU")),
    "hf scale": (FAMILIES["hf"], unusual_scale, dict.fromkeys(NOT_FUSED, "causal or has an unusual scale")),
    "hf end": (FAMILIES["hf"], end_is(55), {}),
    "metaclip_2 end": (FAMILIES["metaclip_2"], end_is(2), {}),  # other models take 2 as: the largest id
    "openai mask": (FAMILIES["openai"], open_masks, dict.fromkeys((*LAYOUT, "text.fused_block"), "not the causal one")),
    "open_clip mask": (OPEN_CLIP, lambda model, tokens: model.attn_mask.zero_(),
                       {CROP: "see later", PREFIX: "not the causal one"}),
    "open_clip hook 0": (OPEN_CLIP, text_hook(0), {"text.fused_block": "1 of 3 blocks (0): a block has hooks"}),
    "open_clip hook 1": (OPEN_CLIP, text_hook(1), dict.fromkeys(("text.fused_block", PREFIX), "a block has hooks")),
    "open_clip hook 2": (OPEN_CLIP, text_hook(2), dict.fromkeys(("text.fused_block", PREFIX), "a block has hooks")),
    # no config has this option
    "padding mask": (PAD_MASK, lambda model, tokens: put(model.text, "use_pad_mask", True), {PREFIX: "later ones"}),
    "coca padding": (FAMILIES["coca"], padding_inside, dict.fromkeys(LAYOUT, "padding in its middle")),
    "coca_correct padding": (FAMILIES["coca_correct"], padding_inside, dict.fromkeys(LAYOUT, "padding in its middle")),
    "coca full": (FAMILIES["coca"], full_prompt, dict.fromkeys(LAYOUT, "fills the context")),
    "coca_correct full": (FAMILIES["coca_correct"], full_prompt, {}),
    "timm hook below": timm_block(lambda block: block.register_forward_hook(scaled), "(0): a block has hooks", 0),
    "timm hook": timm_block(lambda block: block.register_forward_hook(scaled), "(2): a block has hooks"),
    "timm backward hook": timm_block(lambda block: block.mlp.fc1.register_full_backward_hook(lambda *_: None),
                                     "a module of a block has hooks"),
    "timm silu": timm_block(lambda block: put(block.mlp, "act", nn.SiLU()), "a SiLU of torch for its mlp.act"),
    "timm scale": timm_block(lambda block: put(block, "ls1", nn.Linear(24, 24)), "a Linear of torch for its ls1"),
    "timm norm": timm_block(lambda block: put(block.attn, "norm", RmsNorm(24)), "LayerNorm and RMSNorm"),
    "timm gate": timm_block(lambda block: put(block.attn, "gate", nn.Linear(24, 24)), "the submodules of a block"),
    "timm drop path": (DROP_PATH, lambda model, tokens: None, {FUSED: "drop path); set their rates to 0"}),
    "timm rates of 0": (DROP_PATH, no_drop_path, {}),
    "timm size": (VIT._replace(size=24), lambda model, tokens: model.visual.set_input_size(24), {}),
    "timm weight": timm_block(lambda block: put(block.norm1, "weight", None), "a norm of a block has no weight"),
}  # fmt: skip
if "modern_eos" in FAMILIES:  # open_clip 4
    ALTERED |= {f"{name} ends": (FAMILIES[name], unusual_ends, {}) for name in ("modern_eos", "modern_map")}
    ALTERED["open_clip scale"] = (
        OPEN_CLIP, lambda model, tokens: setattr(model.visual.transformer.resblocks[2].attn, "scale", 1.0),
        {FUSED: "a block's attention is scaled"},
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:skipkernels. a block is not fused")
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(("family", "alter", "off"), ALTERED.values(), ids=ALTERED)
def test_step_of_altered_model(family, alter, off, padded, monkeypatch):
    if padded:  # as on a GPU: rows follow the last suffix
        monkeypatch.setattr("skipkernels.towers.prompts.counts_are_known", lambda device: False)
    model, tokens = family.make(), family.tokens.clone()
    alter(model, tokens)
    family = family._replace(tokens=tokens)
    clip = family.cut(1, model)
    for name in {*BOTH_FUSED, *LAYOUT} - family.without.keys():
        assert clip.reductions[name].enabled == (name not in off), name
        assert off.get(name, "") in clip.reductions[name].reason
    family.check_step(clip)


SIGLIP_TEXT = {"pool_type": "last", "no_causal_mask": True}


@pytest.mark.parametrize(
    "make", [siglip, siglip_2, lambda: tiny_clip(family=open_clip.CustomTextCLIP, text=SIGLIP_TEXT)]
)
def test_siglip_text_last_block_computes_one_query(make, monkeypatch):
    calls, pooled = [], rows_module.SingleQuery.__call__

    def recorded(self, query, key_value, **options):
        calls.append((len(query), len(key_value)))
        return pooled(self, query, key_value, **options)

    clip = sk.SkipCLIP(make(), tiny_tokens(CLASSES), skip_layers=1, keep_ratio=1.0)
    assert clip.reductions["text.pooled_last_block"].enabled
    monkeypatch.setattr(rows_module.SingleQuery, "__call__", recorded)
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


@pytest.mark.parametrize("skip", [0, 1])
def test_sin_cos_positions_never_train(skip):
    model = tiny_clip()
    model.visual = open_clip.CLIP(12, {**VISION, "pos_embed_type": "sin_cos_2d"}, TEXT).visual.double()
    assert not model.visual.positional_embedding.requires_grad
    for _ in range(2):  # the second SkipCLIP gets a model that the first one changed
        OPEN_CLIP.cut(1, model)
        clip = OPEN_CLIP.cut(skip, model)
    assert not model.visual.positional_embedding.requires_grad
    OPEN_CLIP.check_step(clip)


def test_openai_half_precision_norms_in_fp32():
    """The model is that of `clip.load` on a GPU."""
    model = openai_clip()
    openai_models().convert_weights(model)
    images, labels = tiny_batch(3, CLASSES, torch.float32)
    clip = sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1)
    clip(images, labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in clip.trainable_parameters())


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def half_precision(request) -> sk.SkipCLIP:
    return OPEN_CLIP.cut(1, half_precision_clip(request.param))


def test_open_clip_half_precision_step(half_precision):
    """Norms are in fp32; bf16 leaves two or three digits of the loss."""
    images = OPEN_CLIP.images(torch.float32)
    assert all(half_precision.reductions[name].enabled for name in BOTH_FUSED)
    loss = half_precision(images, LABELS).loss
    loss.backward()
    expected = OPEN_CLIP.cut(1, tiny_clip(torch.float32))(images, LABELS).loss
    assert loss.item() == pytest.approx(expected.item(), rel=5e-2)
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in half_precision.trainable_parameters())


def test_open_clip_half_precision_dtypes(half_precision):
    visual, images = half_precision.model.visual, OPEN_CLIP.images(torch.float32)
    dtype = visual.conv1.weight.dtype
    image, features = half_precision.encode_image(images), half_precision.encode_lower(images.to(dtype))
    assert image.dtype == features.dtype == half_precision.encode_classes(LABELS).dtype == dtype
    assert visual.ln_post.weight.dtype == torch.float32 != dtype
    assert half_precision.loss(image, LABELS).equal(half_precision(images, LABELS).loss)
    torch.testing.assert_close(half_precision.predict(images), half_precision.predict(features))


def test_images_of_another_size():
    clip = VIT.cut(1, vit(patch_size=4, dynamic_img_size=True))
    assert_matches_reference_step(clip, torch.randn(3, 3, 24, 8, dtype=torch.float64), VIT.tokens, LABELS)


def test_learned_rotary_positions_are_below_cut():
    model = eva(**ROTARY, rope_type="mixed")
    for skip in (0, 1, 3):
        VIT.cut((skip, 1), model)(VIT.images(), LABELS).loss.backward()
        freqs = model.visual.trunk.rope.freqs
        assert freqs.requires_grad == (freqs.grad is not None) == (skip == 0)
        model.zero_grad()
