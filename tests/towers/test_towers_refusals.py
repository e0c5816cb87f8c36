"""Refusals of models: how the model is made, and words of the error; and of calls with a model that is handled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import peft
import pytest
import torch
import transformers
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

import skipkernels as sk
from skipkernels.towers.base import UnsupportedModel
from tests.hugging_face_models import SMALL, hugging_face_clip, siglip
from tests.models import openai_clip, tiny_clip, tiny_coca
from tests.timm_models import ROTARY, convnext, eva, naflex, relative, timm_clip, vit, vitamin
from tests.towers.families import FAMILIES, SHORT_TOKENS, TOKENS, modern_text, nllb


def altered(make: Callable[[], nn.Module], path: str, alter: Callable[[nn.Module], object]) -> nn.Module:
    model = make()
    alter(model.get_submodule(path))
    return model


def own_forward(module: nn.Module) -> None:
    module.forward = module.forward


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, arguments, out: out.square())


def hooked_in_training(module: nn.Module) -> None:
    """A comparison in evaluation mode does not find it."""
    module.register_forward_hook(lambda module, arguments, out: out.flip(-1) if module.training else out)


def patches_only(trunk: nn.Module) -> None:
    trunk.forward_features = lambda x, **rest: trunk.patch_embed(x)


def shared_across_the_cut() -> nn.Module:
    model = tiny_clip()
    blocks = model.visual.transformer.resblocks
    blocks[2].mlp.c_fc.weight = blocks[0].mlp.c_fc.weight
    return model


def named(path: str) -> nn.Module:
    """A model of another type, which need not be installed."""
    module, _, kind = path.rpartition(".")
    model = nn.Module()
    model.__class__ = type(kind, (nn.Module,), {"__module__": module})
    return model


def with_adapters() -> nn.Module:
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["c_proj"]), tiny_clip()).double()


NOT_CALLED = "and SkipCLIP does not call this module"
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer": (lambda: nn.Linear(2, 2), "must be one of open_clip.model.CLIP, .*; got torch.nn"),
    "BERT": (lambda: transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=60)),
             "got transformers.models.bert.modeling_bert.BertModel"),
    "data parallel": (lambda: nn.DataParallel(tiny_clip()), r"Pass the model itself \(.module\)"),
    "compiled": (lambda: torch.compile(tiny_clip()), r"\(._orig_mod\)"),
    "PeftModel": (partial(named, "peft.peft_model.PeftModel"),
                  'inject_adapter_in_model, and pass that with trainable="as_is"'),
    "adapters": (with_adapters, 'is an adapter.*Pass trainable="as_is"'),
    "CLAP": (partial(named, "open_clip.clap_model.CLAP"), "CLAP is not handled: it contrasts audio with text"),
    "ResNet of timm": (lambda: timm_clip(ResNet(BasicBlock, (1, 1, 1, 1), num_classes=12)),
                       "must be one of Vision.*; got timm's ResNet"),
    "parallel pooler": (lambda: tiny_coca(attentional_pool="parallel"), "parallel attentional pooler leaves an axis"),
    "layerdrop": (partial(nllb, layerdrop=0.1), "encoder_layerdrop"),
    "shared positions": (partial(relative, shared_rel_pos=True), "shared_rel_pos"),
    "patch dropout": (partial(eva, **ROTARY, patch_drop_rate=0.5), "patch_drop_rate"),
    "image sizes": (partial(eva, **ROTARY, dynamic_img_size=True), "dynamic_img_size"),
    "random positions": (partial(eva, **ROTARY, rope_shift_coords=0.1), "rope_shift_coords"),
    "rotary NaFlex": (partial(naflex, rope_type="axial"), "rotary positions"),
    "shared weight": (shared_across_the_cut, "resblocks.0.mlp.c_fc.weight is used on both sides of the cut"),
    "hook in training": (partial(altered, tiny_clip, "visual", hooked_in_training), f"visual has hooks, {NOT_CALLED}"),
} | {
    f"hook {path}": (partial(altered, make, path, hooked), f"{path} has hooks, {NOT_CALLED}") for make, path in (
        (vit, "visual.trunk"), (convnext, "visual.trunk.stages.2"),
        (vitamin, "visual.trunk.patch_embed.backbone.stages.1"), (tiny_clip, "transformer"),
    )
} | {
    f"forward {path}": (partial(altered, make, path, own_forward), rf"has a replaced forward\(\), {NOT_CALLED}")
    for make, path in (
        (openai_clip, "transformer"), (hugging_face_clip, "text_model.encoder"), (siglip, "vision_model")
    )
}  # fmt: skip


@pytest.mark.parametrize(("make", "words"), MODELS.values(), ids=MODELS)
def test_model_is_refused(make, words):
    with pytest.raises(UnsupportedModel, match=words):
        sk.SkipCLIP(make(), TOKENS, skip_layers=1)


@pytest.mark.skipif("modern_eos" not in FAMILIES, reason="open_clip 4 has this tower")
def test_register_tokens_are_refused():
    with pytest.raises(UnsupportedModel, match="register tokens"):
        sk.SkipCLIP(modern_text(reg_tokens=2), SHORT_TOKENS, skip_layers=1)


def test_old_transformers_is_refused(monkeypatch):
    model = siglip()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.6")
    with pytest.raises(UnsupportedModel, match="SiglipModel needs transformers 5 or later; got 4.57.6"):
        sk.SkipCLIP(model, TOKENS, skip_layers=1)
    with pytest.raises(UnsupportedModel, match="fuse: .*SiglipEncoderLayer needs transformers 5 or later; got 4.57.6"):
        sk.fuse(model)


@pytest.mark.parametrize("make", [shared_across_the_cut, partial(altered, tiny_clip, "ln_final", hooked_in_training)])
def test_what_is_not_refused(make):
    """A weight shared by blocks above the cut, and a hook of a module that SkipCLIP calls as the model does."""
    sk.SkipCLIP(make(), TOKENS, skip_layers=0)


CALLS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: sk.fuse(nn.Linear(2, 2)), UnsupportedModel,
     "fuse: no block of Linear can be fused: the model has none of open_clip"),
    (lambda: sk.fuse(vit(attn_layer="diff").visual), UnsupportedModel, "can be fused: a block has a Diff"),
    (lambda: sk.fuse(peft.get_peft_model(tiny_clip(), peft.LoraConfig(r=2, target_modules=["c_fc"]))), UnsupportedModel,
     "a Linear of peft for its mlp.c_fc. A block with an adapter .* add_lora"),
    (lambda: sk.fuse(tiny_clip(), memory="low"), ValueError, 'fuse: memory must be "fast", "balanced" or "min"'),
    (lambda: torch.jit.script(sk.fuse(vit())), RuntimeError,
     r"a fused block cannot be scripted. Call skipkernels.unfuse\(model\)"),
    (lambda: FAMILIES["clip"].cut(1, altered(vit, "visual.trunk", patches_only)), RuntimeError, "of an image differ"),
    (lambda: FAMILIES["clip"].cut(1, attention="flash"), ValueError, "attention must be"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), CALLS, ids=[words for *_, words in CALLS])
def test_call_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
