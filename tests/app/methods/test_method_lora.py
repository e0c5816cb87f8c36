"""LoRA against a model with merged weights, its dropout, and its changes to the model."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from method_tasks import BASE, CONTEXT, answers, made, stacked, tiny_model, tiny_task, tokenizer, trained, zero_shot
from torch import nn

from skipkernels.app.data import InputError
from skipkernels.app.methods.lora import LowRankAttention


def merged(method, plain, *, alpha: float = 1.0, rank: int = 2):
    """Model with alpha/√rank · B A added to the packed weight of q, k and v."""
    state = method.state_dict()
    assert {key.rpartition(".")[0] for key in state} == {
        key.removesuffix(".in_proj_weight") for key in plain.state_dict() if key.endswith("attn.in_proj_weight")
    }
    weights = plain.state_dict()
    for path in {key.rpartition(".")[0] for key in state}:
        down, up = state[f"{path}.down"], state[f"{path}.up"]
        weights[f"{path}.in_proj_weight"] += alpha / math.sqrt(rank) * torch.cat([up[i] @ down[i] for i in range(3)])
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize(
    ("family", "text"),
    [(open_clip.CLIP, {}), (open_clip.CustomTextCLIP, {}), (open_clip.CustomTextCLIP, {"embed_cls": True})],
    ids=["CLIP", "CustomTextCLIP", "a mask for each text"],
)
def test_lora_matches_merged_weights(family, text):
    method = made("lora", tiny_model(family, **text), dropout=0.0, rank=3, alpha=0.7)
    trained(method)
    plain = merged(method, tiny_model(family, **text), alpha=0.7, rank=3)
    for test in method.task.tests:
        images = stacked(test.images)[0]
        expected = zero_shot(plain, images, test.prompts)
        torch.testing.assert_close(method.logits(test.name, images), expected, rtol=0, atol=1e-11)

    images, labels = stacked(method.task.train)
    loss, classes = method.step(images, labels)
    text_embeddings = plain.encode_text(tokenizer(method.task.tests[0].prompts[0]), normalize=True)
    logits = plain.logit_scale.exp() * plain.encode_image(images, normalize=True) @ text_embeddings.T
    assert classes == len(BASE)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)


def test_lora_published_size():
    method = made("lora")
    for tower, width in (("text", 16), ("image", 24)):
        group = next(g for g in method.parameter_groups(text_lr=1e-3, image_lr=2e-3) if g["name"] == tower)
        assert sum(p.numel() for p in group["params"]) == 3 * 3 * 2 * 2 * width  # blocks, of q k v, A and B, rank
    attention = method.model.transformer.resblocks[0].attn
    assert attention.dropout.p == 0.25 and attention.scale == pytest.approx(1 / math.sqrt(2))
    assert not attention.up.any()
    assert attention.down.abs().max() <= 1 / 4 and attention.down.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.2)


def test_lora_dropout_is_separate_for_q_k_v(monkeypatch):
    width, scale, p = 8, 0.5, 0.4
    plain = nn.MultiheadAttention(width, 2, batch_first=True, dtype=torch.float64)
    attention = LowRankAttention(plain, width, scale, p, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in (attention.down, attention.up):
            part.copy_(torch.eye(width).expand(3, -1, -1))  # so that the update is the dropped input
    seen = {}
    real = F.scaled_dot_product_attention

    def spy(q, k, v, **mask):
        seen.update(q=q, k=k, v=v)
        return real(q, k, v, **mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x = torch.rand(5, 7, width, dtype=torch.float64) + 1
    torch.manual_seed(0)
    attention(x, x, x)
    changes = []
    for part, weight, bias in zip("qkv", plain.in_proj_weight.chunk(3), plain.in_proj_bias.chunk(3), strict=True):
        got = seen[part].transpose(1, 2).reshape(5, 7, width)
        changes.append((got - F.linear(x, weight, bias)) / scale)
    for change in changes:
        dropped = change.abs() < 1e-12
        assert dropped.double().mean().item() == pytest.approx(p, abs=0.1)
        torch.testing.assert_close(change[~dropped], (x / (1 - p))[~dropped])
    masks = [change.abs() < 1e-12 for change in changes]
    assert not masks[0].equal(masks[1]) and not masks[1].equal(masks[2]) and not masks[0].equal(masks[2])

    attention.eval()
    attention(x, x, x)
    got = seen["k"].transpose(1, 2).reshape(5, 7, width)
    torch.testing.assert_close(got, F.linear(x, plain.in_proj_weight[8:16], plain.in_proj_bias[8:16]) + scale * x)


def test_lora_dropout_changes_steps():
    method = made("lora")
    trained(method)
    images, labels = stacked(method.task.train)
    method.train(True)
    assert method.step(images, labels).loss.item() != method.step(images, labels).loss.item()
    method.train(False)
    assert method.step(images, labels).loss.item() == method.step(images, labels).loss.item()


def test_lora_keeps_weights_and_keys():
    model, plain = tiny_model(), tiny_model()
    method = made("lora", model)
    trained(method)
    state = model.state_dict()
    assert all(state[key].equal(tensor) for key, tensor in plain.state_dict().items())
    assert state.keys() - plain.state_dict().keys() == method.state_dict().keys()


def test_lora_refuses_models_and_arguments():
    model = tiny_model()
    made("lora", model)
    with pytest.raises(
        InputError, match="lora: the text tower .* got ResidualAttentionBlock with LowRankAttention. Create"
    ):
        made("lora", model)
    with pytest.raises(InputError, match="lora: the text tower .* got CustomResidualAttentionBlock with Attention"):
        made("lora", tiny_model(qk_norm=True))
    resnet = tiny_model()
    resnet.visual = nn.Identity()
    with pytest.raises(InputError, match="lora: the image tower .* got Identity"):
        made("lora", resnet)
    for settings, message in (
        ({"rank": 0}, "rank must be at least 1; got 0"),
        ({"dropout": 1.0}, "dropout must be from 0"),
    ):
        with pytest.raises(InputError, match=f"lora: {message}"):
            made("lora", **settings)
    assert CONTEXT == 12 and answers(made("lora", task=tiny_task(1)))["new"].shape == (6, 3)
