"""CoOp against its formula, and the number of context vectors."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from method_tasks import (
    BASE,
    CONTEXT,
    END,
    START,
    answers,
    made,
    stacked,
    tiny_model,
    tiny_task,
    tokenizer,
    trained,
)

from skipkernels.app.data import InputError


def embedded(model, context, name: str) -> torch.Tensor:
    """Embedding [D] of one prompt: start, context, name, full stop, end."""
    text = model if isinstance(model, open_clip.CLIP) else model.text
    ids = tokenizer([f"{name}."])[0]
    words = ids[1 : ids.tolist().index(END)]
    rows = text.token_embedding.weight
    sequence = torch.cat([rows[[START]], context, rows[words], rows[[END]]])
    end = len(sequence) - 1
    hidden = torch.cat([sequence, rows[[0] * (CONTEXT - len(sequence))]]) + text.positional_embedding
    causal = torch.full((CONTEXT, CONTEXT), -torch.inf, dtype=hidden.dtype).triu(1)
    for block in text.transformer.resblocks:
        hidden = block(hidden[None], attn_mask=causal)[0]
    return text.ln_final(hidden[end]) @ text.text_projection


@pytest.mark.parametrize("family", [open_clip.CLIP, open_clip.CustomTextCLIP], ids=lambda family: family.__name__)
def test_coop_logits_and_step_match_formula(family):
    method = made("coop", tiny_model(family), vectors=3)
    trained(method)
    assert method.context.shape == (3, 16) and not method.notes
    for test in method.task.tests:
        images = stacked(test.images)[0]
        text = torch.stack([embedded(method.model, method.context, name) for name in test.classes])
        image = method.model.encode_image(images)
        expected = method.model.logit_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        torch.testing.assert_close(method.logits(test.name, images), expected.detach(), rtol=0, atol=1e-11)

    images, labels = stacked(method.task.train)
    loss, classes = method.step(images, labels)
    text = F.normalize(torch.stack([embedded(method.model, method.context, name) for name in BASE]), dim=1)
    logits = method.model.logit_scale.exp() * F.normalize(method.model.encode_image(images), dim=1) @ text.T
    expected = F.cross_entropy(logits, labels)
    assert classes == len(BASE) and loss.item() == pytest.approx(expected.item(), rel=1e-12)
    grads = [torch.autograd.grad(value, method.context)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_coop_initial_context():
    method = made("coop", tiny_model(width=512, heads=8), vectors=6)
    assert method.context.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(method.context.mean().item()) < 2e-3


@torch.no_grad()
def test_coop_does_not_change_model():
    model = tiny_model()
    images = stacked(tiny_task().train)[0][:2]
    tokens = tokenizer(BASE)
    before = model.encode_image(images), model.encode_text(tokens)
    method = made("coop", model)
    with torch.enable_grad():
        trained(method)
    for expected, got in zip(before, (model.encode_image(images), model.encode_text(tokens)), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)  # PyTorch's path depends on requires_grad
    assert not model.token_embedding._forward_hooks


def test_coop_reduces_vectors_to_fit():
    method = made("coop")
    # start, three words, full stop and end leave 6 of 12
    assert len(method.context) == 6
    assert method.notes == [
        "coop: 6 context vectors in place of 16: with 'grey alder tree' the prompt would have 22 tokens, and the model "
        "takes 12."
    ]
    assert len(made("coop", vectors=6).context) == 6 and not made("coop", vectors=6).notes
    short = tiny_task(new=["fig"])
    assert len(made("coop", task=short).context) == 7, "names of all tests count"


def test_coop_refuses_long_name():
    name = " ".join("abcdefghijkl")
    with pytest.raises(InputError, match=f"coop: no context fits beside the class name '{name}', which takes all 12"):
        made("coop", task=tiny_task(new=[name]))
    with pytest.raises(InputError, match="coop: vectors must be at least 1; got 0"):
        made("coop", vectors=0)


def test_coop_pools_end_of_text_by_id():
    model = tiny_model(open_clip.CustomTextCLIP, pool_type="eos", eos_id=END)
    same = tiny_model(open_clip.CustomTextCLIP)
    for got, expected in zip(answers(made("coop", model)).values(), answers(made("coop", same)).values(), strict=True):
        assert got.equal(expected)


@pytest.mark.parametrize("text", [{"pool_type": "last"}, {"embed_cls": True}], ids=["last", "class token"])
def test_coop_refuses_other_pooling(text):
    with pytest.raises(InputError, match="coop: the text tower of model must pool the end-of-text token; that of this"):
        made("coop", tiny_model(open_clip.CustomTextCLIP, **text))


@pytest.mark.parametrize("name", ["coop", "clip-adapter", "linear-probe"])
def test_frozen_methods_embed_each_image_once(name):
    method = made(name)
    images, labels = stacked(method.task.train)
    embeddings = method.encode_frozen(images)
    assert embeddings.shape == (20, 12) and not embeddings.requires_grad
    method.model.visual.register_forward_hook(lambda *_: pytest.fail("the image tower runs again"))
    (method.fit if name == "linear-probe" else method.step)(embeddings, labels)
    assert method.logits("base", embeddings).shape == (20, 5)
