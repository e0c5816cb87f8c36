"""SkipCLIP.sigmoid_loss: value and gradients against PyTorch in fp64, and the selection of its classes."""

from __future__ import annotations

import copy
import functools

import naive
import pytest
import torch
import torch.nn.functional as F
from models import tiny_batch, tiny_clip, tiny_tokens

import skipkernels as sk
from skipkernels.selection import base_keep

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
    plain, tokens = copy.deepcopy(model).requires_grad_(True), tiny_tokens(CLASSES)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=2, train_logit_scale=True).train(mode == "train")
    biases = [torch.tensor(-3.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    given = biases[0] if bias == "trained" else bias
    with torch.set_grad_enabled(mode != "no_grad"):
        out = sk.pairs.sigmoid_loss(clip, images, LABELS, max_labels=3, logit_bias=given)
    ids = out.class_ids
    assert (mode == "train") == (len(ids) < CLASSES) and out.targets.equal(LABELS[:, ids].bool())

    image, text = (
        F.normalize(embed(plain, x, skip, False), dim=1)
        for embed, x in ((naive.embed_images, images), (naive.embed_texts, tokens[ids]))
    )
    logits = plain.logit_scale.exp() * image @ text.T
    logits = logits + (plain.logit_bias if bias is None else biases[1] if bias == "trained" else bias)
    loss = F.binary_cross_entropy_with_logits(logits, LABELS[:, ids].double())
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.logits, logits.detach(), rtol=1e-10, atol=1e-10)
    if mode == "no_grad":
        assert not out.loss.requires_grad
        return
    out.loss.backward()
    loss.backward()
    pairs = [(p.grad, plain.get_parameter(name).grad, name) for name, p in model.named_parameters() if p.requires_grad]
    pairs += [(biases[0].grad, biases[1].grad, "bias")] if bias == "trained" else []
    for got, right, name in pairs:
        # fp64: rounding of two orders of summation, as in test_clip.py
        assert (got - right).norm() <= 1e-9 * right.norm() + 1e-15, name


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


@pytest.mark.parametrize(
    ("labels", "max_labels", "message"),
    [
        (LABELS.tolist(), 3, r"labels must be a tensor \[B=4, C=17\], .* got list"),
        (torch.zeros(4).long(), 3, r"labels must be a tensor \[B=4, C=17\], .* call clip\(pixel_values, labels\)"),
        (LABELS * 0.5, 3, "labels must be 0 or 1; got 0.0 to 0.5"),
        (LABELS, 2, "max_labels must be at least 3, the labels of an image; got 2"),
        (LABELS, 0, "max_labels must be a whole number, at least 1; got 0"),
        (LABELS.to("meta"), 3, "labels must be on cpu, where pixel_values is; got meta"),
    ],
)
def test_sigmoid_loss_refuses(labels, max_labels, message):
    with pytest.raises(ValueError, match=f"^sigmoid_loss: {message}"):
        sk.pairs.sigmoid_loss(_clip(), tiny_batch(4, CLASSES, torch.float32)[0], labels, max_labels=max_labels)


@functools.cache
def _clip() -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(CLASSES), skip_layers=1)
