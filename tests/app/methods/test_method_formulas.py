"""Each method against its formula: logits of every test, loss and gradients of a step, and weights to start with."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.app.methods.method_tasks import (
    BASE,
    CONTEXT,
    END,
    FAMILIES,
    START,
    embeddings,
    logits_of,
    made,
    stacked,
    tiny_model,
    tiny_task,
    tokenizer,
    trained,
)

CLIP, CUSTOM = FAMILIES


def whole(method, images, prompts):
    """The tuned model, in open_clip."""
    return embeddings(method.model, images, prompts)


def adapter(method, images, prompts):
    """Two layers change a part of the image embedding."""
    image, text = embeddings(method.model, images, prompts)
    hidden = (image @ method.down.T).clamp_min(0)
    return 0.2 * (hidden @ method.up.T).clamp_min(0) + 0.8 * image, text


def coop(method, images, prompts):
    """A prompt is the start, the context, the name, a full stop and the end."""
    text = method.model if isinstance(method.model, CLIP) else method.model.text
    rows, causal = text.token_embedding.weight, torch.full((CONTEXT, CONTEXT), -torch.inf).triu(1).double()

    def embedded(prompt):
        ids = tokenizer([prompt])[0].tolist()
        words = ids[1 : ids.index(END)]
        sequence = torch.cat([rows[[START]], method.context, rows[words], rows[[END]]])
        hidden = torch.cat([sequence, rows[[0] * (CONTEXT - len(sequence))]]) + text.positional_embedding
        for block in text.transformer.resblocks:
            hidden = block(hidden[None], attn_mask=causal)[0]
        return text.ln_final(hidden[len(sequence) - 1]) @ text.text_projection

    names = [prompt.removeprefix("a photo of ") for prompt in prompts[0]]
    return method.model.encode_image(images), torch.stack([embedded(name) for name in names])


def lora(method, images, prompts):
    """1/√rank · B A is added to the packed weight of q, k and v."""
    own = getattr(method.model, "text", method.model)
    masked = {"embed_cls": getattr(own, "cls_emb", None) is not None}
    plain, state = tiny_model(type(method.model), **masked), method.state_dict()
    weights, names = plain.state_dict(), {key.rpartition(".")[0] for key in state}
    assert {f"{name}.in_proj_weight" for name in names} == {key for key in weights if key.endswith("in_proj_weight")}
    for name in names:
        down, up = state[f"{name}.lora_A"], state[f"{name}.lora_B"]
        weights[f"{name}.in_proj_weight"] += 1 / math.sqrt(2) * torch.cat([up[i] @ down[i] for i in range(3)])
    plain.load_state_dict(weights)
    return embeddings(plain, images, prompts)


# Method, its formula, its settings, and the model.
ROWS = {
    "skip": ("skip", whole, {"keep_ratio": 1.0}, tiny_model),
    "full": ("full", whole, {}, tiny_model),
    "coop": ("coop", coop, {"vectors": 3}, tiny_model),
    "coop custom": ("coop", coop, {"vectors": 3}, lambda: tiny_model(CUSTOM)),
    "coop end by id": ("coop", coop, {"vectors": 3}, lambda: tiny_model(CUSTOM, pool_type="eos", eos_id=END)),
    "adapter": ("clip-adapter", adapter, {}, tiny_model),
    "lora": ("lora", lora, {}, tiny_model),
    "lora custom": ("lora", lora, {}, lambda: tiny_model(CUSTOM)),
    "lora mask": ("lora", lora, {}, lambda: tiny_model(CUSTOM, embed_cls=True)),
}


@pytest.mark.parametrize(("name", "formula", "settings", "make"), ROWS.values(), ids=ROWS)
def test_logits_and_step_equal_the_formula(name, formula, settings, make):
    method = made(name, make(), **settings)
    trained(method, rate=0.02 if name in ("skip", "full") else 0.05)
    for test in method.task.tests:
        images = stacked(test.images)[0]
        expected = logits_of(method.model, *formula(method, images, test.prompts)).detach()
        logits = method.logits(test.name, method.encode_frozen(images))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)

    images, labels = stacked(method.task.train)
    loss, classes = method.step(method.encode_frozen(images), labels)
    logits = logits_of(method.model, *formula(method, images, method.task.tests[0].prompts[:1]))
    expected = F.cross_entropy(logits, labels)
    assert classes == len(BASE) and loss.item() == pytest.approx(expected.item(), rel=1e-12)
    if name != "lora":  # tests/test_lora.py has its gradients
        own = [p for group in method.parameter_groups(text_lr=1, image_lr=1) for p in group["params"]]
        for got, right in zip(*(torch.autograd.grad(x, own) for x in (loss, expected)), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-12)


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


def test_coop_initial_context():
    method = made("coop", tiny_model(width=512, heads=8), vectors=6)
    assert method.context.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(method.context.mean().item()) < 2e-3


def test_adapter_initial_weights():
    state = made("clip-adapter").state_dict()
    for weight, width in ((state["down"], 12), (state["up"], 3)):
        bound = width**-0.5
        assert 0.7 * bound < weight.abs().max() <= bound and weight.min() < 0 < weight.max()


def test_lora_initial_weights_and_order():
    """A is drawn for each text block, then for each image block; the optimizer of a checkpoint has A and B by block."""
    method = made("lora", generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    order = []
    for tower, width in (("", 16), ("visual.", 24)):
        for block in range(3):
            path = f"{tower}transformer.resblocks.{block}.attn"
            drawn = torch.empty(3, 2, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            assert method.state_dict()[f"{path}.lora_A"].equal(drawn.double())
            order += [f"{path}.lora_A", f"{path}.lora_B"]
    named = {factor.data_ptr(): name for name, factor in method.state_dict().items()}
    groups = method.parameter_groups(text_lr=0, image_lr=0)
    assert [named[p.data_ptr()] for group in groups for p in group["params"]] == order
