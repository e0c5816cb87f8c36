"""LoRA against a model with merged weights, and its changes to the model."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from method_tasks import BASE, made, stacked, tiny_model, tokenizer, trained, zero_shot

import skipkernels as sk
from skipkernels.app.data import InputError


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
    method = made("lora", tiny_model(family, **text), rank=3, alpha=0.7)
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
    state = method.state_dict()
    assert not any(factor.any() for name, factor in state.items() if name.endswith(".up"))
    down = state["transformer.resblocks.0.attn.down"]
    assert down.abs().max() <= 1 / 4 and down.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.2)


def test_lora_initial_weights_and_order():
    """A is drawn for each text block, then for each image block; the optimizer of a checkpoint has A and B by block."""
    method = made("lora", generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    order = []
    for tower, width in (("", 16), ("visual.", 24)):
        for block in range(3):
            path = f"{tower}transformer.resblocks.{block}.attn"
            drawn = torch.empty(3, 2, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            assert method.state_dict()[f"{path}.down"].equal(drawn.double())
            order += [f"{path}.down", f"{path}.up"]
    named = {factor.data_ptr(): name for name, factor in method.state_dict().items()}
    groups = method.parameter_groups(text_lr=0, image_lr=0)
    assert [named[p.data_ptr()] for group in groups for p in group["params"]] == order


def test_lora_keeps_weights_and_keys():
    model, plain = tiny_model(), tiny_model()
    method = made("lora", model)
    trained(method)
    expected = {key: merged(method, tiny_model()).state_dict()[key] for key in plain.state_dict()}
    sk.merge_lora(method.clip)
    assert model.state_dict().keys() == expected.keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-15)


def test_lora_refuses_models_and_arguments():
    model = tiny_model()
    made("lora", model)
    with pytest.raises(InputError, match="lora: .* is an adapter"):
        made("lora", model)
    with pytest.raises(InputError, match="lora: .*must be fused"):
        made("lora", tiny_model(qk_norm=True))
    for settings, message in (({"rank": 0}, "rank must be an integer"), ({"alpha": 0.0}, "alpha must be above 0")):
        with pytest.raises(InputError, match=f"lora: .*{message}"):
            made("lora", **settings)
