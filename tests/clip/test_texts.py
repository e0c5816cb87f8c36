"""Texts of the classes: packed features, replacement, other classes, several templates, constant texts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import skipkernels as sk
from skipkernels import memory
from skipkernels.clip.text_features import TextFeatures
from skipkernels.testing import saved_bytes
from tests.allocations import allocated_bytes
from tests.clip.clips import IMAGES, LABELS, C, class_weights, make_clip, three_templates
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.naive_step import assert_step_equals_naive


@pytest.mark.parametrize("shared", [True, False])
def test_text_features_are_packed_by_chunks(shared):
    """Hidden states [C, L, W] of whole prompts are never in memory."""
    tokens = tiny_tokens(600)
    if not shared:
        tokens[1, 0] = 58
    clip = sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1, chunk=7)
    texts, prompts = clip.texts, clip.texts.templates[0]
    before, whole = texts.features.table().features, 600 * prompts.prompt_length
    assert (prompts.prefix_length > 0) == shared
    assert before.equal(texts.tower.lower(prompts.select(torch.arange(600))))
    texts.drop()
    peak = allocated_bytes(texts.features.table)
    assert texts.features.table().features.equal(before)
    assert before.nbytes <= peak < before.nbytes + whole * before[0].nbytes / 2


# ---- replacement -----------------------------------------------------------------------------------------------------


def tuned(**options) -> tuple[sk.SkipCLIP, torch.optim.Optimizer]:
    """SkipCLIP after one step that changes the weights, and its optimizer."""
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), **{"skip_layers": 1, "keep_ratio": 0.4, **options})
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1), momentum=0.9)
    clip(*tiny_batch(3, C)).loss.backward()
    optimizer.step()
    return clip, optimizer


@pytest.mark.parametrize(("classes", "tail"), [(C, "fixed"), (30, "resample")])
def test_set_classes_equals_fresh_skipclip(classes, tail):
    clip, optimizer = tuned(class_weight=class_weights(), tail=tail)
    frozen = frozenset({"ln_final.bias"})
    clip.model.ln_final.bias.requires_grad_(False)
    clip.gradient_checkpointing_enable()
    before = [(p, p.detach().clone(), p.requires_grad) for p in clip.parameters()]
    momentum = copy.deepcopy(optimizer.state_dict())
    tokens, old_state = tiny_tokens(classes, seed=4), clip.get_extra_state()

    clip.set_classes(tokens, class_weights(classes))
    for p, (same, value, requires_grad) in zip(clip.parameters(), before, strict=True):
        assert p is same and p.equal(value) and p.requires_grad == requires_grad
    torch.testing.assert_close(optimizer.state_dict()["state"], momentum["state"], rtol=0, atol=0)
    assert clip.texts.tower.cut.memory == "min"
    with pytest.raises(ValueError, match="other prompts"):
        clip.set_extra_state(old_state)

    model = copy.deepcopy(clip.model).requires_grad_(True)
    fresh = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=0.4, tail=tail)
    assert fresh.prototypes.equal(clip.prototypes) and clip.class_weight.equal(class_weights(classes).double())
    x, labels = tiny_batch(3, classes)
    assert fresh.predict(x).equal(clip.predict(x))
    fresh.sampler = copy.deepcopy(clip.sampler)
    for _ in range(3):
        assert fresh(x, labels).class_ids.equal(clip(x, labels).class_ids)
    assert_step_equals_naive(clip, tokens, x, labels, class_weight=class_weights(classes), frozen=frozen)
    clip.set_classes(tokens)
    assert clip.class_weight is None


# ---- other classes ---------------------------------------------------------------------------------------------------


def other_tokens(templates: int = 1) -> torch.Tensor:
    return torch.stack([tiny_tokens(23, seed=4 + t) for t in range(templates)], dim=1).squeeze(1)


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("templates", [1, 2])
def test_predict_other_classes_equals_the_model(templates, skip):
    """With the current weights, as after set_classes; zero-shot embeddings would be wrong."""
    (clip, _), tokens = tuned(skip_layers=skip), other_tokens(templates)
    classes = clip.class_embeddings(tokens)
    logits = clip.predict(IMAGES, class_embeddings=classes)
    assert logits.equal(clip.predict(IMAGES, tokens=tokens)) and not classes.requires_grad
    texts = tokens[:, None] if tokens.ndim == 2 else tokens
    text = F.normalize(sum(clip.model.encode_text(x, normalize=True) for x in texts.unbind(1)), dim=1)
    torch.testing.assert_close(classes, text.detach(), rtol=0, atol=1e-12)
    right = clip.model.logit_scale.exp() * clip.model.encode_image(IMAGES, normalize=True) @ text.T
    torch.testing.assert_close(logits, right.detach(), rtol=1e-10, atol=1e-10)
    clip.set_classes(tokens)
    assert clip.class_embeddings().equal(classes)


@pytest.mark.parametrize("skip", [0, 1])
def test_predict_other_classes_leaves_the_task(skip):
    clip, _ = tuned(skip_layers=skip)
    own, state = clip.texts.kept_embeddings(), clip.get_extra_state()
    table = clip.texts.features.table() if skip else None
    clip.predict(IMAGES, tokens=other_tokens())
    assert clip.training and all(module.training for module in clip.model.modules())
    assert clip.texts.kept_embeddings() is own and clip.get_extra_state().equal(state)
    assert (not skip or clip.texts.features.table() is table) and clip.predict(IMAGES).shape == (4, C)


def test_other_classes_with_text_cache_and_constant_texts(tmp_path):
    tokens = tiny_tokens(5, seed=4)
    right = make_clip(torch.float32).class_embeddings(tokens)
    for options in ({"text_cache": tmp_path}, {"train_text": False}, {"lower_device": "cpu"}):
        torch.testing.assert_close(make_clip(torch.float32, **options).class_embeddings(tokens), right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_classes_of_another_dtype(dtype):
    """The logits are computed in fp32, on rounded embeddings."""
    clip = make_clip(torch.float32)
    classes = clip.class_embeddings(tiny_tokens(5, seed=4)).to(dtype)
    assert clip.predict(IMAGES.float(), class_embeddings=classes).equal(
        clip.predict(IMAGES.float(), class_embeddings=classes.float())
    )


# ---- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_templates_are_averaged(skip):
    """Prototypes, predictions, evaluations and the plain module; the step is in test_step.py."""
    tokens, model = three_templates(), tiny_clip()
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip)
    assert [prompts.prefix_length for prompts in clip.texts.templates] == [3, 2, 0]
    assert clip.reductions["text.shared_prefix"].reason == "the prompts begin with different tokens"
    texts = F.normalize(torch.stack([model.encode_text(t, True) for t in tokens.unbind(1)]).mean(0), dim=-1)
    torch.testing.assert_close(clip.prototypes, texts.detach(), rtol=0, atol=1e-12)
    expected = model.logit_scale.exp() * F.normalize(model.encode_image(IMAGES), dim=-1) @ texts.T
    for logits in (clip.predict(IMAGES), clip.eval()(IMAGES, LABELS).logits, clip.classifier()(IMAGES)):
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def clip_of_templates(tokens: torch.Tensor) -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1, keep_ratio=1.0)


def test_templates_of_a_copy_follow_a_change_of_the_weights():
    tokens, (x, labels) = three_templates(C), tiny_batch(4, C)
    clip = clip_of_templates(tokens)
    twin = pickle.loads(pickle.dumps(clip))
    assert twin(x, labels).loss.equal(clip(x, labels).loss)
    with torch.no_grad():
        for part in (clip, twin):
            part.model.transformer.resblocks[0].mlp.c_fc.weight.mul_(1.1)
    assert_step_equals_naive(clip, tokens, x, labels)
    twin.refresh()
    twin.gradient_checkpointing_enable()
    assert_step_equals_naive(twin, tokens, x, labels)


def test_state_is_of_the_templates_in_their_order():
    tokens = three_templates(C)
    state = clip_of_templates(tokens).get_extra_state()
    clip_of_templates(tokens).set_extra_state(state)
    with pytest.raises(ValueError, match="other prompts"):
        clip_of_templates(tokens.flip(1)).set_extra_state(state)


def test_set_classes_with_fewer_templates():
    tokens, (x, labels) = three_templates(C), tiny_batch(4, C)
    clip = clip_of_templates(tokens)
    clip.set_classes(tokens[:5, :2])
    assert_step_equals_naive(clip, tokens[:5, :2], x, labels % 5)
    clip.set_classes(tokens[:, 1:2])
    assert clip.texts.tokens.equal(tokens[:, 1].int())


def test_templates_move_with_the_model():
    clip = clip_of_templates(three_templates(C)).to("meta")
    held = [x for prompts in clip.texts.templates for x in prompts.tensors().values()]
    assert {x.device.type for x in (*held, clip.prototypes)} == {"meta"}


def test_free_memory_is_not_asked_below_the_cut(monkeypatch):
    """Nothing is saved there; a decision for its rows would be that of every smaller step."""
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1)
    monkeypatch.setattr("skipkernels.memory.free_bytes", lambda device: pytest.fail("asked"))
    clip.encode_lower(torch.cat([tiny_batch(3, C)[0]] * 20))


def test_templates_share_the_free_memory(monkeypatch):
    """A step runs the text tower three times: `memory="auto"` counts what they save together."""
    clip = sk.SkipCLIP(tiny_clip(), three_templates(C), skip_layers=1)
    clip(*tiny_batch(3, C))
    rows = torch.zeros(20_000, 16, dtype=torch.float64)
    saved = memory.most_saved_bytes(rows, fused=True) * 2  # two blocks
    monkeypatch.setattr("skipkernels.memory.free_bytes", lambda device: 2 * saved + 2)
    assert clip.texts.tower.block_memory(rows, fused=True) == "min"
    clip.set_classes(tiny_tokens(C))
    assert clip.texts.tower.block_memory(rows, fused=True) == "fast"


@pytest.mark.parametrize("tokens", [tiny_tokens(C), tiny_tokens(C)[:, None]], ids=["[C, L]", "[C, 1, L]"])
def test_tokens_are_a_copy(tokens):
    given = tokens.int()
    clip = make_clip(tokens=given)
    state = clip.get_extra_state()
    given.zero_()
    assert clip.get_extra_state().equal(state)


# ---- constant texts --------------------------------------------------------------------------------------------------


def image_only(model: torch.nn.Module, **options) -> sk.SkipCLIP:
    return sk.SkipCLIP(model, tiny_tokens(C), **{"skip_layers": 1, "train_text": False} | options)


def test_training_leaves_the_texts_and_their_embeddings():
    model = tiny_clip()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("visual.")}
    clip = image_only(model)
    step = sk.graphed(clip, torch.optim.SGD(clip.parameter_groups(text_lr=1.0, image_lr=1.0)), batch_size=len(IMAGES))
    losses = [step(IMAGES, LABELS).loss.item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert all(model.get_parameter(name).equal(value) for name, value in before.items())
    clip.eval()
    assert clip.class_embeddings().equal(clip.prototypes)
    with torch.no_grad():
        expected = model.logit_scale.exp() * F.normalize(model.encode_image(IMAGES), dim=-1) @ clip.prototypes.T
    torch.testing.assert_close(clip.predict(IMAGES), expected)
    torch.testing.assert_close(clip(IMAGES, LABELS).logits, expected)


def test_a_step_reads_and_saves_nothing_of_the_texts(monkeypatch):
    whole, alone = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, keep_ratio=1.0), image_only(tiny_clip())
    assert saved_bytes(lambda: alone(IMAGES, LABELS).loss) < saved_bytes(lambda: whole(IMAGES, LABELS).loss)
    alone.set_classes(tiny_tokens(C + 3, seed=5))
    monkeypatch.setattr(TextFeatures, "table", lambda features: pytest.fail("features of the texts were read"))
    alone(IMAGES, LABELS).loss.backward()
    alone.predict(IMAGES)


def test_half_precision_compares_with_constants_in_fp32():
    clip = image_only(tiny_clip(torch.bfloat16))
    assert clip.prototypes.dtype == torch.float32
    clip(IMAGES.bfloat16(), LABELS).loss.backward()
    assert all(p.grad.isfinite().all() for p in clip.trainable_parameters())


def test_text_parameters_that_require_gradients_are_refused():
    clip = image_only(tiny_clip())
    clip.model.text_projection.requires_grad_(True)
    with pytest.raises(RuntimeError, match="requires_grad was set on parameters below the cut"):
        clip.eval()
    clip.refresh()
    assert not clip.model.text_projection.requires_grad and clip.train()(IMAGES, LABELS).loss.isfinite()
