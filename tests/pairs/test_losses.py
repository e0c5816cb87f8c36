"""Losses of a SkipCLIP for images with captions, and for images with several labels, against the naive step."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import skipkernels as sk
from skipkernels.selection import base_keep
from tests import naive
from tests.clip.clips import C, three_templates
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.naive_step import assert_same_loss, plain_copy

EXAMPLES = Path(__file__).parents[2] / "examples"


# ---- pairs of images and captions ------------------------------------------------------------------------------------


def naive_pair_loss(model, images, tokens, skip, bias=None):
    logits, own = naive.cosine_logits(model, images, tokens, skip), torch.arange(len(images))
    if bias is None:
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return F.softplus(-(logits + bias) * (2 * torch.eye(len(images)) - 1)).sum() / len(images)


def pair_batch(dtype=torch.float64):
    """Five images, 13 captions, and the caption of each image, one of them twice."""
    return tiny_batch(5, 13, dtype)[0], tiny_tokens(13), torch.tensor([7, 0, 12, 7, 3])


@pytest.mark.parametrize(
    ("skip", "kind", "loss", "chunk"),
    [
        *((skip, kind, "softmax", None) for skip in (0, 1, 3, (2, 1)) for kind in ("ids", "tokens")),
        (1, "ids", "sigmoid", None),
        (1, "tokens", "softmax", 3),  # of 5 pairs
        ((2, 1), "ids", "softmax", 8),
        (0, "tokens", "sigmoid", 1),
        (3, "ids", "sigmoid", 2),
    ],
    ids=str,
)
def test_pair_loss_equals_naive_step(skip, kind, loss, chunk):
    model, (images, tokens, ids) = tiny_clip(), pair_batch()
    plain = plain_copy(model)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, train_logit_scale=True)
    ours, theirs = (torch.tensor([-1.5]).double().requires_grad_() if loss == "sigmoid" else None for _ in "ab")
    captions = ids if kind == "ids" else tokens[ids]
    found = sk.pairs.pair_loss(clip, images, captions, loss=loss, logit_bias=ours, chunk=chunk)
    expected = naive_pair_loss(plain, images, tokens[ids], clip.skip_layers, theirs)
    assert_same_loss(clip, 2 * found, plain, 2 * expected)
    assert loss == "softmax" or ours.grad.item() == pytest.approx(theirs.grad.item(), rel=1e-10)


def test_pair_loss_takes_new_captions_features_and_smaller_batches():
    model, (images, tokens, ids) = tiny_clip(), pair_batch()
    plain = copy.deepcopy(model)
    clip = sk.SkipCLIP(model, tiny_tokens(2, seed=3), skip_layers=1)
    before = clip.texts.templates[0]
    for count in (5, 1, 3):
        loss = sk.pairs.pair_loss(clip, clip.encode_lower(images[:count]), tokens[ids[:count]].int())
        torch.testing.assert_close(loss, naive_pair_loss(plain, images[:count], tokens[ids[:count]], (1, 1)))
    assert clip.texts.templates[0] is before, "the classes stay"


@pytest.mark.parametrize("kind", ["ids", "tokens"])
def test_pair_loss_under_autocast_and_in_evaluation(kind, tmp_path):
    images, tokens, ids = pair_batch(torch.float32)
    captions = ids if kind == "ids" else tokens[ids]
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tokens, skip_layers=1, text_cache=tmp_path)
    expected = sk.pairs.pair_loss(clip, images, captions)
    with torch.autocast("cpu", torch.bfloat16):
        half = sk.pairs.pair_loss(clip, images, captions)
    half.backward()
    # bf16 has 8 bits: the error of cosines is about 2^-8, and the temperature multiplies it by 14.
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected.item(), abs=14 * 2**-6)
    clip.eval()
    torch.testing.assert_close(sk.pairs.pair_loss(clip, images, captions), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pair_loss_of_templates_in_half_precision(dtype):
    """The mean over templates has the dtype of the images' embeddings."""
    clip = sk.SkipCLIP(tiny_clip(torch.float32).to(dtype), three_templates(), skip_layers=1)
    images, ids = tiny_batch(4, C)
    assert clip.encode_classes(ids).dtype == clip.encode_image(images.to(dtype)).dtype == dtype
    assert sk.pairs.pair_loss(clip, images.to(dtype), ids).isfinite()


def test_example_improves_recall(capsys):
    main = runpy.run_path(str(EXAMPLES / "tune_pairs.py"))["main"]
    before, after = main(["--epochs", "2"])
    for then, now in zip(before, after, strict=True):
        assert now[5] > then[5] + 0.03
    assert "image to text" in capsys.readouterr().out


# ---- several labels --------------------------------------------------------------------------------------------------


CLASSES = 17


def labels_of(*of_images, classes=CLASSES):
    labels = torch.zeros(len(of_images), classes)
    for row, ids in zip(labels, of_images, strict=True):
        row[list(ids)] = 1
    return labels


LABELS = labels_of([2, 11], [], [11], [5, 0, 2])


@pytest.mark.parametrize("bias", [None, -3.0, "trained"])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("skip", [0, 2])
def test_sigmoid_loss_equals_naive_step(skip, mode, bias):
    model, images = tiny_clip(), tiny_batch(4, CLASSES)[0]
    if bias is None:
        model.logit_bias = torch.nn.Parameter(torch.tensor([-2.0], dtype=torch.float64))  # as in SigLIP
    plain, tokens = plain_copy(model), tiny_tokens(CLASSES)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=2, train_logit_scale=True).train(mode == "train")
    biases = [torch.tensor(-3.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    given = biases[0] if bias == "trained" else bias
    with torch.set_grad_enabled(mode != "no_grad"):
        out = sk.pairs.sigmoid_loss(clip, images, LABELS, max_labels=3, logit_bias=given)
    ids = out.class_ids
    assert (mode == "train") == (len(ids) < CLASSES) and out.targets.equal(LABELS[:, ids].bool())

    logits = naive.cosine_logits(plain, images, tokens[ids], clip.skip_layers)
    logits = logits + (plain.logit_bias if bias is None else biases[1] if bias == "trained" else bias)
    loss = F.binary_cross_entropy_with_logits(logits, LABELS[:, ids].double())
    torch.testing.assert_close(out.logits, logits.detach(), rtol=1e-10, atol=1e-10)
    if mode == "no_grad":
        assert not out.loss.requires_grad and out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
        return
    assert_same_loss(clip, out.loss, plain, loss)
    assert bias != "trained" or biases[0].grad.item() == pytest.approx(biases[1].grad.item(), rel=1e-9)


def test_one_label_per_image_selects_the_classes_of_forward():
    images, ids = tiny_batch(3, 40)[0], torch.tensor([7, 30, 7])
    model, tokens = tiny_clip(), tiny_tokens(40)
    kept = []
    for multi in (False, True):
        clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=5)
        for _ in range(3):
            one_hot = F.one_hot(ids, 40)
            out = sk.pairs.sigmoid_loss(clip, images, one_hot, max_labels=1) if multi else clip(images, ids)
            kept.append(out.class_ids.tolist())
    assert kept[:3] == kept[3:]


@pytest.mark.parametrize("tail", ["resample", "fixed"])
def test_number_of_classes_does_not_depend_on_labels(tail):
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(40), skip_layers=1, keep_ratio=4, tail=tail)
    images, kept = tiny_batch(3, 40)[0], []
    for of_images in ([[], [], []], [range(7), range(7, 14), range(33, 40)], [[39], [39, 1], []]):
        labels = labels_of(*of_images, classes=40)
        out = sk.pairs.sigmoid_loss(clip, images, labels, max_labels=7)
        assert out.targets.sum() == labels.sum(), "every label is kept"
        kept.append(len(out.class_ids))
    rounding = tail == "resample"  # of Σq, down or up
    assert max(kept) - min(kept) <= rounding and 40 > max(kept) and min(kept) >= 21 > base_keep(40, 4, 50)


def test_sigmoid_loss_under_autocast_and_with_integer_labels():
    model, images = tiny_clip(torch.float32), tiny_batch(4, CLASSES, torch.float32)[0]
    clip = sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1, keep_ratio=1, memory="min")
    full = sk.pairs.sigmoid_loss(clip, images, LABELS.bool(), max_labels=3)
    with torch.autocast("cpu", torch.bfloat16):
        half = sk.pairs.sigmoid_loss(clip, images, LABELS.long(), max_labels=3)
    half.loss.backward()
    assert half.loss.dtype == half.logits.dtype == torch.float32
    # bf16 has 8 bits: the error of cosines is about 2^-8, and the temperature multiplies it by 14.
    assert half.loss.item() == pytest.approx(full.loss.item(), abs=14 * 2**-6)
