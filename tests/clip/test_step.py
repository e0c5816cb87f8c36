"""The step, and the comparison with all classes: equal to the naive step of `naive.py`; its labels and its output."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import skipkernels as sk
from skipkernels import functional
from skipkernels.selection import RankSampler
from skipkernels.testing import gradients, saved_bytes
from tests import naive
from tests.clip.clips import IMAGES, LABELS, C, class_weights, drawn, make_clip, mixup, three_templates
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.naive_step import assert_step_equals_naive, plain_copy
from tests.reference_step import assert_equal_gradients


class Case(NamedTuple):
    """Options of SkipCLIP, and of its model and batch."""

    options: dict[str, Any]
    tokens: Tensor = tiny_tokens(C)
    labels: Tensor = LABELS
    training: bool = True
    dtype: torch.dtype = torch.float64
    quick: bool = False


SMOOTH = {"label_smoothing": 0.2, "class_weight": class_weights()}
CASES = {f"skip{skip}": Case({"skip_layers": skip}) for skip in (0, 1, 2, 3, (1, 2), (3, 0))}
CASES |= {"fixed": Case({"tail": "fixed"}, quick=True), "fp32": Case({"skip_layers": (1, 2)}, dtype=torch.float32)}
CASES |= {
    f"templates-skip{skip}-keep{keep}": Case({"skip_layers": skip, "keep_ratio": keep}, tokens=three_templates())
    for skip in (0, 1, 3)
    for keep in (0.4, 1.0)
}
CASES |= {
    f"{'-'.join(['soft', *options])}-{'train' if training else 'eval'}": Case(
        {"train_logit_scale": True, **options}, labels=mixup(LABELS), training=training
    )
    for options in ({}, {"label_smoothing": 0.2}, {"class_weight": class_weights()})
    for training in (True, False)
}
CASES |= {
    "smoothing-weights": Case(SMOOTH),
    "smoothing-weights-all": Case({"keep_ratio": 1.0, **SMOOTH}),
    "smoothing-weights-eval": Case(SMOOTH, training=False),
    "logit_scale": Case({"train_logit_scale": True}),
    "constant_texts": Case({"train_text": False, "label_smoothing": 0.1}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_step_equals_naive(case):
    """Kept classes by the naive ranking and the same draws; loss and gradients by all tokens of these classes."""
    images = IMAGES.to(case.dtype)
    options = {"skip_layers": 1, "keep_ratio": 0.4, **case.options}
    model = tiny_clip(case.dtype, quick_gelu=case.quick)
    plain = plain_copy(model)
    generator = torch.Generator().manual_seed(7)
    clip = sk.SkipCLIP(model, case.tokens, generator=generator, **options).train(case.training)
    loss = {name: options[name] for name in ("label_smoothing", "class_weight") if name in options}
    train_text = options.get("train_text", True)
    out = assert_step_equals_naive(
        clip, case.tokens, images, case.labels, quick=case.quick, train_text=train_text, **loss
    )
    if not case.training or not train_text:
        assert out.class_ids.tolist() == list(range(C)) and out.targets.equal(case.labels)
        return
    with torch.no_grad():
        prototypes = naive.class_embeddings(plain, case.tokens, 0, case.quick)
    hard = case.labels.ndim == 1
    labelled = case.labels if hard else case.labels.any(dim=0).nonzero().flatten()
    ranking = naive.class_ranking(plain, images, labelled, prototypes, case.quick)
    drawn = RankSampler(options["keep_ratio"], tail=options.get("tail", "resample"), generator=generator.manual_seed(7))
    kept = sorted(ranking[rank] for rank in drawn.draw(C, len(labelled) if not hard else len(images)).tolist())
    assert out.class_ids.tolist() == kept and set(labelled.tolist()) <= set(kept)
    expected = torch.tensor([kept.index(label) for label in case.labels.tolist()]) if hard else case.labels[:, kept]
    assert out.targets.equal(expected)


@st.composite
def prompts(draw):
    """Tokens [C, 77]: a shared prefix of 0 to 4, names of 1 to 30, or the same prompt for all."""
    C, prefix = draw(st.integers(1, 7)), draw(st.integers(0, 4))
    same_length, identical = draw(st.booleans()), draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tokens = torch.zeros(C, 77, dtype=torch.int64)
    length = 0
    for i, row in enumerate(tokens):
        if i == 0 or not (same_length or identical):
            length = draw(st.integers(1, 30))
        row[:prefix] = torch.arange(50, 50 + prefix)
        row[prefix : prefix + length] = torch.randint(1, 50, (length,), generator=generator)
        row[prefix + length] = 59
        if identical:
            row[:] = tokens[0]
    return tokens


@settings(max_examples=15, deadline=None)
@given(
    tokens=prompts(),
    batch=st.integers(1, 5),
    skip=st.sampled_from([0, 1, 2, 3, (0, 2), (2, 0)]),
    keep=st.sampled_from([1, 0.5, 1.0]),
    memory=st.sampled_from(["fast", "min"]),
    quick=st.booleans(),
)
def test_step_equals_naive_for_any_prompts(tokens, batch, skip, keep, memory, quick):
    """Loss and every gradient in fp64, for any shared prefix and any lengths."""
    clip = sk.SkipCLIP(tiny_clip(quick_gelu=quick), tokens, skip_layers=skip, keep_ratio=keep, memory=memory)
    assert_step_equals_naive(clip, tokens, *tiny_batch(batch, len(tokens)), quick=quick)


# ---- labels and output -----------------------------------------------------------------------------------------------


def test_one_hot_labels_are_class_ids():
    one, other = make_clip(), make_clip()
    for _ in range(3):
        ids, soft = one(IMAGES, LABELS), other(IMAGES, F.one_hot(LABELS, C).double())
        assert ids.class_ids.equal(soft.class_ids)
        torch.testing.assert_close(ids.loss, soft.loss, rtol=1e-12, atol=0)


def test_forward_return_logits():
    """Another loss of them trains the same parameters, the logit scale too."""
    clip = make_clip(train_logit_scale=True)
    assert clip(IMAGES, LABELS).logits is None
    for out in (clip(IMAGES, LABELS, return_logits=True), clip(IMAGES, mixup(LABELS))):  # soft labels have logits
        loss = F.cross_entropy(out.logits, out.targets)
        assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        expected = gradients(clip.model, loss, retain_graph=True)
        out.loss.backward()
        assert_equal_gradients(clip.model, expected)
        clip.zero_grad()


def test_forward_under_autocast():
    model, (images, labels) = tiny_clip(torch.float32), tiny_batch(4, 9, torch.float32)
    clip = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = clip(images, labels)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert clip.predict(images).dtype == torch.float32
    full = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1)(images, labels)
    # bf16 has 8 bits: the error of cosines is about 2^-8, and the temperature multiplies it by 14.
    assert out.loss.item() == pytest.approx(full.loss.item(), abs=14 * 2**-6)


def test_scores_under_autocast_are_those_of_fp32():
    """Rounded scores would keep other classes, and casting all prototypes takes time."""
    image, texts = IMAGES.flatten(1)[:, :12].bfloat16(), make_clip(torch.float32).texts
    expected = functional.class_scores(image.float(), texts.prototypes, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        assert texts.scores(image, LABELS).equal(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_features_give_the_result_of_images_under_autocast(dtype):
    """Features may be in 16 bits, as those of open_clip are; the residual stream above the cut is in fp32 for both."""
    images, labels = tiny_batch(4, 9, torch.float32)
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(9), skip_layers=1).eval()
    with torch.autocast("cpu", dtype):
        features = clip.encode_lower(images)
        assert features.dtype == dtype and clip(features, labels).loss.equal(clip(images, labels).loss)
        assert clip.encode_upper(features).equal(clip.encode_image(images))


def test_global_random_state_is_unchanged():
    model, tokens, (images, labels) = tiny_clip(), tiny_tokens(30), tiny_batch(2, 30)
    before = torch.get_rng_state()
    sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=3)(images, labels)
    assert torch.get_rng_state().equal(before)


def test_saved_bytes_shrink_with_the_cut():
    images, labels = tiny_batch(4, 9)
    saved = []
    for skip in (0, 1, 2, 3):
        clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=skip)
        saved.append(saved_bytes(lambda clip=clip: clip(images, labels)))
    assert saved == sorted(saved, reverse=True) and saved[3] < saved[0] / 5


def test_saved_bytes_of_memory_modes():
    """test_each_family.py compares their steps, without free memory."""
    images, labels = tiny_batch(4, 9)
    saved = {}
    for memory in ("fast", "min", "auto"):
        clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=1, memory=memory)
        features = clip.encode_lower(images)
        saved[memory] = saved_bytes(lambda clip=clip, features=features: clip(features, labels))
    assert saved["auto"] == saved["fast"] > 3 * saved["min"]


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
def test_evaluation_compares_every_class_without_draw(gradients):
    clip, other, (images, labels) = make_clip(), make_clip(), tiny_batch(20, C)  # a larger batch than in training
    first = drawn(clip)
    clip.eval()
    with torch.set_grad_enabled(gradients):
        out = clip(images, labels)
    expected = torch.nn.functional.cross_entropy(clip.predict(images), labels)
    assert out.logits.shape == (20, C) and out.class_ids.tolist() == list(range(C)) and out.targets.equal(labels)
    torch.testing.assert_close(out.logits.detach(), clip.predict(images), rtol=1e-10, atol=1e-10)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    clip.train()
    assert first + drawn(clip) == drawn(other, 6)


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)])
def test_evaluation_logits_are_those_of_predict_in_half_precision(dtype, autocast):
    """Class embeddings in 16 bits would move the logits by half a unit."""
    clip = sk.SkipCLIP(tiny_clip(dtype), tiny_tokens(C), skip_layers=1).eval()
    images, labels = tiny_batch(4, C)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = clip.predict(images.to(dtype))
        torch.testing.assert_close(clip(images.to(dtype), labels).logits, expected, rtol=1e-5, atol=1e-5)
