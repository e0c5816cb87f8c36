"""Refusals of SkipCLIP: the arguments or the call, the error, and words of it. A refused call has no effect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import skipkernels as sk
from skipkernels.clip.state import Origin, pack_state
from tests.clip.clips import IMAGES, LABELS, C, class_weights, make_clip, mixup
from tests.models import tiny_clip, tiny_tokens

# ---- construction ----------------------------------------------------------------------------------------------------


def tokens_with(number: int) -> Tensor:
    tokens = tiny_tokens(C)
    tokens[2, 3] = number
    return tokens


CONSTRUCTION: list[tuple[dict[str, Any], str]] = [
    ({"skip_layers": 4}, "SkipCLIP: skip_layers must be a whole number from 0 to 3"),
    ({"skip_layers": float("nan")}, "SkipCLIP: skip_layers must be"),
    ({"skip_layers": (1, 2, 3)}, "SkipCLIP: skip_layers must be one number or a pair"),
    ({"keep_ratio": 0.0}, "RankSampler: keep_ratio must be above 0"),
    ({"keep_ratio": 0.0, "train_text": False}, "RankSampler: keep_ratio must be above 0"),
    ({"chunk": "a"}, "SkipCLIP: chunk must be a whole number, at least 1; got 'a'"),
    ({"generator": 0}, "RankSampler: generator must be a torch.Generator; got 0"),
    ({"model": (tiny_clip(), None)}, "SkipCLIP: model must be a CLIP, .*; got tuple. Pass its first"),
    ({"tokens": [[1, 2]]}, "SkipCLIP: tokens must be an int64 or int32 tensor .* got list"),
    ({"tokens": tiny_tokens(C)[:, :0]}, "SkipCLIP: tokens .* L ≥ 1"),
    ({"tokens": tiny_tokens(C, context=80)}, r"must be \[C, L=77\], as long as the model's context; got \[17, 80\]"),
    ({"tokens": tokens_with(60)}, r"tokens must be ids in \[0, 60\), the model's vocabulary; got "),
    ({"tokens": tokens_with(-1)}, r"tokens must be ids in \[0, 60\), the model's vocabulary; got -1"),
    ({"tokens": tokens_with(1 << 32)}, r"tokens must be ids in \[0, 60\)"),  # 0 in int32
    ({"label_smoothing": 1.5}, r"SkipCLIP: label_smoothing must be a number in \[0, 1\]; got 1.5"),
    ({"class_weight": [1.0] * C}, r"SkipCLIP: class_weight must be a floating-point tensor \[C=17\].*; got list"),
    ({"class_weight": class_weights(C + 1)}, r"class_weight .* got torch.float32 \[18\]"),
    ({"class_weight": -class_weights()}, "class_weight must be .*not negative; got -.* for class 1"),
    ({"class_weight": class_weights().requires_grad_()}, "SkipCLIP: class_weight is a constant"),
    ({"text_cache": "x", "skip_layers": 0}, "text_cache keeps features at the cut"),
]


@pytest.mark.parametrize(("options", "words"), CONSTRUCTION, ids=[words for _, words in CONSTRUCTION])
def test_construction_is_refused(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        sk.SkipCLIP(**{"model": tiny_clip(), "tokens": tiny_tokens(C), "skip_layers": 1} | options)


def test_text_cache_of_fp64_is_refused(tmp_path):
    with pytest.raises(sk.CacheError, match=r"text_cache stores fp32, fp16, bf16; .*float64"):
        make_clip(text_cache=tmp_path)


# ---- calls -----------------------------------------------------------------------------------------------------------

# Of images and labels, in training and in evaluation
BATCHES: list[tuple[Callable[[Tensor, Tensor], tuple], type[Exception], str]] = [
    (lambda x, y: ((255 * x).to(torch.uint8), y), TypeError, "images must be floating-point, .*got torch.uint8"),
    (lambda x, y: (torch.full_like(x, torch.nan), y), ValueError, r"NaN or infinity in images \[0, 1, 2, 3\]"),
    (lambda x, y: (x[:0], y[:0]), ValueError, r"at least one image; got \[0, 3, 16, 16\]"),
    (lambda x, y: (x.repeat(1, 1, 2, 2), y), ValueError, r"must be \[B, 3, 16, 16\].*got \[4, 3, 32, 32\]"),
    (lambda x, y: (list(x), y), TypeError, "got list. Stack a list of images"),
    (lambda x, y: (x[0], y), ValueError, r"must be images \[B, 3, height, width\] .* got \[3, 16, 16\]"),
    (lambda x, y: (torch.zeros(4, 4, 24).double(), y), ValueError, r"at the cut \[B, 5, 24\]; got \[4, 4, 24\]"),
    (lambda x, y: (torch.zeros(3, 24, 24).double(), y), ValueError, r"got \[3, 24, 24\]"),  # one image, as wide as W
    (lambda x, y: (x, None), TypeError, "got NoneType. Without labels use clip.predict"),
    (lambda x, y: (x, y[:2]), ValueError, r"int64 \[B=4\], or .*; got torch.int64 \[2\]"),
    (lambda x, y: (x, F.one_hot(y, C)), ValueError, r"int64 \[4, 17\]. .*one-hot.*labels.argmax\(dim=1\)"),
    (lambda x, y: (x, y - 100), ValueError, r"SkipCLIP: labels must be in \[0, C=17\); got -"),
    (lambda x, y: (x, mixup(y)[:, :-1]), ValueError, r"or probabilities .* \[B=4, C=17\]; got .* \[4, 16\]"),
    (lambda x, y: (x, 2 * mixup(y)), ValueError,
     "must be probabilities, not negative, that sum to 1 for each image; got sums from 2 to 2"),
    (lambda x, y: (x, mixup(y, 1.5)), ValueError, "must be probabilities, not negative.* and values from -0.5"),
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("alter", "error", "words"), BATCHES, ids=[words for *_, words in BATCHES])
def test_batch_is_refused(alter, error, words, training):
    clip = make_clip().train(training)
    with pytest.raises(error, match=words) as caught:
        clip(*alter(IMAGES, LABELS))
    assert "\n" not in str(caught.value)


EMBEDDINGS = F.normalize(torch.ones(5, 12).double(), dim=1)
CALLS: list[tuple[Callable[[sk.SkipCLIP], object], type[Exception], str]] = [
    *((lambda clip, name=name, x=x: getattr(clip, name)(x), ValueError, "SkipCLIP: ")
      for name in ("encode_lower", "encode_image", "predict")
      for x in (IMAGES[:0], IMAGES.repeat(1, 1, 2, 2), torch.full((3, 5, 24), torch.nan).double())),
    *((lambda clip, x=x: clip.encode_upper(x), ValueError, r"be .* \[B, 5, 24\], at least one; got .* \[")
      for x in (IMAGES, torch.zeros(0, 5, 24).double())),
    *((lambda clip, ids=ids: clip.encode_classes(ids), ValueError, "SkipCLIP: class_ids must be")
      for ids in ([0, 1], torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0, C]))),
    (lambda clip: clip.top_k(IMAGES, 0), ValueError, r"top_k: k must be in \[1, C=17\]; got 0"),
    (lambda clip: clip.top_k(IMAGES, C + 1), ValueError, r"top_k: k must be in \[1, C=17\]; got 18"),
    (lambda clip: clip.predict(IMAGES, tokens=tiny_tokens(5)[:, :20]), ValueError, r"\[C, L=77\]"),
    (lambda clip: clip.predict(IMAGES, tokens=tiny_tokens(5) + 1), ValueError, r"tokens must be ids in \[0, 60\)"),
    (lambda clip: clip.predict(IMAGES, class_embeddings=tiny_tokens(5)), ValueError,
     r"class_embeddings must be .* \[C', D=12\], at least one; got torch.int64 \[5, 77\]"),
    (lambda clip: clip.predict(IMAGES, class_embeddings=torch.ones(5, 12)), ValueError,
     "class_embeddings must have unit norm; got norms from 3.46 to 3.46"),
    (lambda clip: clip.predict(IMAGES, class_embeddings=EMBEDDINGS.to("meta")), ValueError,
     "class_embeddings must be on cpu, where prototypes is; got meta"),
    (lambda clip: clip.predict(IMAGES, class_embeddings=EMBEDDINGS, tokens=tiny_tokens(5)), TypeError,
     "pass tokens or class_embeddings; got both"),
    (lambda clip: clip.loss(IMAGES, LABELS), ValueError,
     r"SkipCLIP.loss: image must be .* \[B, D=12\], at least one; got .*\[4, 3, 16, 16\]. .*encode_image"),
    (lambda clip: clip.loss(torch.zeros(0, 12).double(), LABELS[:0]), ValueError, r"at least one; got .*\[0, 12\]"),
    (lambda clip: clip.loss(torch.zeros(4, 12).long(), LABELS), ValueError,
     "image must be image embeddings, floating-point .* got torch.int64"),
    (lambda clip: clip.loss(torch.zeros(4, 12).double(), LABELS[:2]), ValueError,
     r"labels must be class ids, int64 \[B=4\], or probabilities"),
    (lambda clip: clip.loss(torch.zeros(4, 12).double(), LABELS + C), ValueError, r"labels must be in \[0, C=17\)"),
    (lambda clip: clip.set_classes(tiny_tokens(5)[:, :20]), ValueError, r"must be \[C, L=77\]"),
    (lambda clip: clip.set_classes(tiny_tokens(5) + 1), ValueError, "ids in"),
    (lambda clip: clip.set_classes(tiny_tokens(5), class_weights(6)), ValueError, r"class_weight must be .*\[C=5\]"),
    (lambda clip: clip.set_extra_state(torch.zeros(3, dtype=torch.float16)), ValueError,
     "must be the uint8 tensor .* got torch.float16 .* To average"),
    (lambda clip: clip.set_extra_state({"generator": 1}), ValueError, "must be the uint8 tensor .* got dict"),
    (lambda clip: clip.set_extra_state(torch.zeros(9, dtype=torch.uint8)), ValueError, "is damaged"),
    (lambda clip: clip.set_extra_state(clip.get_extra_state().roll(1)), ValueError, "is damaged"),
    (lambda clip: clip.set_extra_state(make_clip(tokens=tiny_tokens(C).flip(0)).get_extra_state()), ValueError,
     "is of other prompts; .* with the same prompts in this order"),
    (lambda clip: clip.set_extra_state(pack_state(clip._origin()._replace(processes=4), torch.zeros(1), {})),
     ValueError, "of other processes; "),
    (lambda clip: clip.set_extra_state(pack_state(Origin("", 7, 1), torch.zeros(1), {})), ValueError,
     "is of other prompts and width; "),
    (lambda clip: clip._replicate_for_data_parallel(), RuntimeError,
     "Use DistributedDataParallel, with a process for each GPU"),
    (lambda clip: torch.export.export(clip, (IMAGES, LABELS)), RuntimeError, r"Export .* clip.classifier\(\)"),
    (lambda clip: sk.FeatureCache.build("x", clip.model, [(IMAGES[0], 0)]), TypeError, "clip must be a SkipC"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), CALLS, ids=[words for *_, words in CALLS])
def test_call_is_refused(call, error, words):
    clip = make_clip()
    logits, state = clip.predict(IMAGES), clip.get_extra_state()
    with pytest.raises(error, match=words):
        call(clip)
    assert clip.predict(IMAGES).equal(logits) and clip.get_extra_state().equal(state)


MOVED_ALONE: dict[str, Callable[[sk.SkipCLIP, Tensor], object]] = {
    "forward": lambda clip, features: clip(features, LABELS),
    "predict": lambda clip, features: clip.predict(features),
    "loss": lambda clip, features: clip.loss(torch.zeros(4, 12), LABELS),
    "encode_image": lambda clip, features: clip.encode_image(features),
    "encode_upper": lambda clip, features: clip.encode_upper(features),
    "encode_classes": lambda clip, features: clip.encode_classes(LABELS),
    "class_embeddings": lambda clip, features: clip.class_embeddings(),
    "classifier": lambda clip, features: clip.classifier(),
    "pair_loss": lambda clip, features: sk.pairs.pair_loss(clip, features, LABELS),
}


@pytest.mark.parametrize("name", MOVED_ALONE)
def test_model_that_was_moved_alone_is_refused(name):
    clip = make_clip()
    features = clip.encode_lower(IMAGES)
    clip.model.to("meta")
    with pytest.raises(RuntimeError, match="the model was moved alone to meta; prompts and prototypes are on cpu"):
        MOVED_ALONE[name](clip, features)
