"""Other classes in evaluation: embeddings and logits in fp64 against the model, and the task, which stays."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import skipkernels as sk
from tests.models import tiny_batch, tiny_clip, tiny_tokens

C = 17
IMAGES, LABELS = tiny_batch(4, C)


def make_clip(dtype: torch.dtype = torch.float64, **options) -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(dtype), tiny_tokens(C), **{"skip_layers": 1, "keep_ratio": 3, **options})


@functools.cache
def _clip() -> sk.SkipCLIP:
    return make_clip()


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("templates", [1, 2])
def test_predict_other_classes_leaves_the_task(templates, skip):
    clip = make_clip(skip_layers=skip)
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1))
    clip(IMAGES, LABELS).loss.backward()
    optimizer.step()  # zero-shot embeddings would be wrong now
    tokens = torch.stack([tiny_tokens(23, seed=4 + t) for t in range(templates)], dim=1).squeeze(1)
    own, state, table = clip.texts.kept_embeddings(), clip.get_extra_state(), clip.texts._table

    classes = clip.class_embeddings(tokens)
    logits = clip.predict(IMAGES, class_embeddings=classes)
    assert logits.equal(clip.predict(IMAGES, tokens=tokens)) and not classes.requires_grad
    texts = tokens[:, None] if tokens.ndim == 2 else tokens
    text = F.normalize(sum(clip.model.encode_text(x, normalize=True) for x in texts.unbind(1)), dim=1)
    torch.testing.assert_close(classes, text.detach(), rtol=0, atol=1e-12)
    right = clip.model.logit_scale.exp() * clip.model.encode_image(IMAGES, normalize=True) @ text.T
    torch.testing.assert_close(logits, right.detach(), rtol=1e-10, atol=1e-10)

    assert clip.training and all(module.training for module in clip.model.modules())
    assert clip.texts.kept_embeddings() is own and clip.get_extra_state().equal(state)
    assert clip.texts._table is table and clip.predict(IMAGES).shape == (4, C)
    twin = copy.deepcopy(clip)
    twin.set_classes(tokens)
    assert twin.class_embeddings().equal(classes)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": tiny_tokens(5)[:, :20]}, ValueError, r"\[C, L=77\]"),
        ({"tokens": tiny_tokens(5) + 1}, ValueError, r"SkipCLIP: tokens must be ids in \[0, 60\)"),
        (
            {"class_embeddings": tiny_tokens(5)},
            ValueError,
            r"class_embeddings must be .* \[C', D=12\]; got torch.int64 \[5, 77\]",
        ),
        (
            {"class_embeddings": torch.ones(5, 12)},
            ValueError,
            "class_embeddings must have unit norm; got norms from 3.46 to 3.46",
        ),
        (
            {"class_embeddings": torch.zeros(5, 12), "tokens": tiny_tokens(5)},
            TypeError,
            "pass tokens or class_embeddings; got both",
        ),
    ],
    ids=["length", "vocabulary", "tokens", "norm", "both"],
)
def test_predict_other_classes_refuses(options, error, message):
    with pytest.raises(error, match=message):
        _clip().predict(IMAGES, **options)
