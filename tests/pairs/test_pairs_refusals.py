"""Refusals of the losses of pairs and of several labels: the arguments, and words of the error."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

import skipkernels as sk
from skipkernels import functional
from tests.models import tiny_batch, tiny_clip, tiny_tokens

C = 17
IMAGES = tiny_batch(4, C)[0]
IDS = torch.arange(4)
LABELS = torch.zeros(4, C).index_put_((torch.tensor([0, 0, 0, 2, 3]), torch.tensor([0, 2, 5, 11, 2])), torch.ones(()))


@functools.cache
def clip_of(**options: Any) -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, **options)


PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"captions": ["a cat"] * 4}, r"captions must be int64 or int32, ids \[B=4\] or tokens .* got list"),
    ({"captions": torch.zeros(4, 2, 77, dtype=torch.int64)}, r"captions .* got torch.int64 \[4, 2, 77\]"),
    ({"captions": torch.full((4,), C)}, r"captions must be in \[0, C=17\); got 17 to 17"),
    ({"captions": torch.full((4, 77), 60)}, r"captions must be ids in \[0, 60\)"),
    ({"captions": torch.zeros(4, 20, dtype=torch.int64)}, r"as long as the model's context; got \[4, 20\]"),
    ({"loss": "hinge"}, "loss must be one of softmax, sigmoid; got 'hinge'"),
    ({"logit_bias": -10.0}, 'logit_bias is for loss="sigmoid"'),
    ({"loss": "sigmoid", "logit_bias": torch.ones(2)}, r"logit_bias must be a finite number .*; got \[2\]"),
    ({"chunk": 0}, "chunk must be a whole number of pairs, at least 1, or None; got 0"),
    ({"chunk": True}, "chunk must be a whole number .* got True"),
]


@pytest.mark.parametrize(("arguments", "words"), PAIRS, ids=[words for _, words in PAIRS])
def test_pair_loss_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        sk.pairs.pair_loss(clip_of(), IMAGES, **{"captions": IDS, **arguments})


SIGMOID: list[tuple[dict[str, Any], str]] = [
    ({"labels": LABELS.tolist()}, r"labels must be a tensor \[B=4, C=17\], .* got list"),
    ({"labels": IDS}, r"labels must be a tensor \[B=4, C=17\], .* call clip\(pixel_values, labels\)"),
    ({"labels": LABELS * 0.5}, "labels must be 0 or 1; got 0.0 to 0.5"),
    ({"labels": LABELS.to("meta")}, "labels must be on cpu, where pixel_values is; got meta"),
    ({"max_labels": 2}, "max_labels must be at least 3, the labels of an image; got 2"),
    ({"max_labels": 0}, "max_labels must be a whole number, at least 1; got 0"),
    ({"max_labels": True}, "max_labels must be a whole number, at least 1; got True"),
    ({"logit_bias": torch.zeros(4)}, r"logit_bias must be a finite number or a tensor of one element; got \[4\]"),
    ({"logit_bias": True}, "logit_bias must be a finite number .*; got True"),
    ({"logit_bias": math.inf}, "logit_bias must be a finite number .*; got inf"),
]


@pytest.mark.parametrize(("arguments", "words"), SIGMOID, ids=[words for _, words in SIGMOID])
def test_sigmoid_loss_is_refused(arguments, words):
    with pytest.raises(ValueError, match=f"^sigmoid_loss: {words}"):
        sk.pairs.sigmoid_loss(clip_of(), IMAGES, **{"labels": LABELS, "max_labels": 3, **arguments})


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"class_weight": torch.ones(C)}], ids="".join)
def test_options_of_the_cross_entropy_are_refused(options):
    clip, [name] = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, **options), options
    with pytest.raises(ValueError, match=f"^pair_loss: {name} of SkipCLIP is an option of the cross-entropy"):
        sk.pairs.pair_loss(clip, IMAGES, IDS)
    with pytest.raises(ValueError, match=f"^sigmoid_loss: {name} of SkipCLIP is an option"):
        sk.pairs.sigmoid_loss(clip, IMAGES, LABELS, max_labels=3)


EMBEDDINGS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"text": torch.ones(4, 8)}, ValueError, r"text must be \[3, 8\], the shape of image; got \[4, 8\]"),
    ({"text": torch.ones(3, 7)}, ValueError, r"text must be \[3, 8\], the shape of image; got \[3, 7\]"),
    ({"image": torch.ones(3, 8).long()}, TypeError, "image must be float32"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), EMBEDDINGS, ids=[words for *_, words in EMBEDDINGS])
@pytest.mark.parametrize(("name", "bias"), [("contrastive_loss", {}), ("pairwise_sigmoid_loss", {"logit_bias": 0.0})])
def test_embeddings_are_refused(name, bias, arguments, error, words):
    rows = torch.ones(3, 8)
    with pytest.raises(error, match=f"^{name}: {words}"):
        getattr(functional, name)(**{"image": rows, "text": rows, "logit_scale": 1.0, **bias, **arguments})
