"""Training and evaluation mode: dropout and batch norms on both sides of the cut."""

from __future__ import annotations

import pytest
import torch

import skipkernels as sk
from skipkernels.towers.modes import deterministic_training, evaluating
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.timm_models import naflex, vit

CLASSES = 7


def set_attention_dropout(block: torch.nn.Module, rate: float) -> None:
    """Set the rate of `nn.MultiheadAttention`, or of the `Attention` of open_clip 4."""
    if hasattr(block.attn, "attn_drop"):
        block.attn.attn_drop.p = rate
    else:
        block.attn.dropout = rate


@pytest.mark.parametrize(
    ("make", "tokens"),
    [
        (lambda: tiny_clip(vision={"patch_dropout": 0.5}), 5),
        (lambda: naflex(patch_drop_rate=0.5), 4),
        (lambda: vit(pos_drop_rate=0.5), 5),
    ],
    ids=["open_clip", "naflex", "positions"],
)
def test_patch_dropout_below_the_cut_is_off(make, tokens):
    images = tiny_batch(3, CLASSES)[0]
    clip = sk.SkipCLIP(make().train(), tiny_tokens(CLASSES), skip_layers=1)
    features = clip.encode_lower(images)
    assert features.shape[1] == tokens
    assert clip.encode_image(images).equal(clip.encode_upper(features))


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


def test_predict_uses_evaluation_mode():
    """Predictions have no dropout in any mode, and neither have the stored class embeddings."""
    model, tokens, (images, _) = tiny_clip(), tiny_tokens(CLASSES), tiny_batch(3, CLASSES)
    for stack in (model.visual.transformer, model.transformer):
        set_attention_dropout(stack.resblocks[2], 0.5)
    clip = sk.SkipCLIP(model.train(), tokens, skip_layers=1)
    got = clip.predict(images)
    assert model.visual.training
    assert model.transformer.resblocks[2].attn.training
    model.eval()
    torch.testing.assert_close(got, model.get_logits(images, tokens)[0].detach())
    assert clip.predict(images).equal(got)


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
        assert [module.training for module in model] == [True, True, False, False]
    assert not any(module.training for module in model.modules())
