"""Training and evaluation mode: dropout and hooks on both sides of the cut."""

from __future__ import annotations

import pytest
import torch
from models import tiny_batch, tiny_clip, tiny_tokens

import skipkernels as sk
from skipkernels.towers import UnsupportedModel, deterministic_training, evaluating

CLASSES = 7


def set_attention_dropout(block: torch.nn.Module, rate: float) -> None:
    """Set the rate of `nn.MultiheadAttention`, or of the `Attention` of open_clip 4."""
    if hasattr(block.attn, "attn_drop"):
        block.attn.attn_drop.p = rate
    else:
        block.attn.dropout = rate


def test_patch_dropout_below_the_cut_is_off():
    model = tiny_clip(vision={"patch_dropout": 0.5, "image_size": 32}).train()
    images = torch.nn.functional.interpolate(tiny_batch(3, CLASSES)[0], 32)
    clip = sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1)
    features = clip.encode_lower(images)
    assert features.shape[1] == 17 and clip.encode_image(images).equal(clip.encode_upper(features))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_dropout_draws_above_cut_only(tower):
    model, tokens, (images, labels) = tiny_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    stack = (model.visual if tower == "image" else model).transformer
    for depth in (0, 2):
        set_attention_dropout(stack.resblocks[depth], 0.5)
    clip = sk.SkipCLIP(model.train(), tokens, skip_layers=1, keep_ratio=1.0)
    assert "dropout" in clip.reductions[f"{tower}.fused_block"].reason
    features = clip.encode_lower(images)
    assert features.equal(clip.encode_lower(images))
    losses = {clip(features, labels).loss.item() for _ in range(3)}
    assert len(losses) == 3
    model.eval()
    assert features.equal(clip.encode_lower(images))
    assert len({clip(features, labels).loss.item() for _ in range(3)}) == 1


@pytest.mark.parametrize("part", ["visual", "transformer", "ln_final"])
def test_hook_active_in_training_only_is_found(part):
    """A hook that changes the result in training mode only is not found by a comparison in evaluation mode."""
    model, tokens = tiny_clip(), tiny_tokens(CLASSES)
    getattr(model, part).register_forward_hook(lambda mod, args, out: out.flip(-1) if mod.training else out)
    if part == "ln_final":  # SkipCLIP calls this module, as the model does
        sk.SkipCLIP(model, tokens, skip_layers=1)
    else:
        with pytest.raises(UnsupportedModel, match=f"{part} has hooks, and SkipCLIP does not call this module"):
            sk.SkipCLIP(model, tokens, skip_layers=1)


def test_predict_uses_evaluation_mode():
    """Predictions have no dropout in any mode, and neither have the stored class embeddings."""
    model, tokens, (images, _) = tiny_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    for stack in (model.visual.transformer, model.transformer):
        set_attention_dropout(stack.resblocks[2], 0.5)
    clip = sk.SkipCLIP(model.train(), tokens, skip_layers=1)
    got = clip.predict(images)
    assert model.visual.training and model.transformer.resblocks[2].attn.training
    model.eval()
    torch.testing.assert_close(got, model.get_logits(images, tokens)[0].detach())
    assert clip.predict(images).equal(got)


def test_modes_are_restored():
    model, tokens, (images, labels) = tiny_clip().train(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    model.visual.transformer.resblocks[0].mlp.eval()
    model.ln_final.eval()
    before = {name: module.training for name, module in model.named_modules()}
    clip = sk.SkipCLIP(model, tokens, skip_layers=1)
    clip(images, labels)
    clip.predict(images)
    assert before == {name: module.training for name, module in model.named_modules()}


def test_deterministic_training_freezes_dropout_and_batch_norm():
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2),
        torch.nn.Dropout(0.0),
        torch.nn.BatchNorm1d(2),
        torch.nn.Sequential(torch.nn.Dropout(0.1)),
    ).eval()
    with deterministic_training(model):
        assert [module.training for module in model] == [True, True, False, False]
        assert not model[3][0].training
        with evaluating(model):
            assert not any(module.training for module in model)
        assert model[0].training
    assert not any(module.training for module in model.modules())
