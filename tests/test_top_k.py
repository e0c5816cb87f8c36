"""Top-k classes over chunks of classes, against a stable sort of all logits."""

from __future__ import annotations

import pytest
import torch
from models import tiny_batch, tiny_clip, tiny_tokens
from torch import Tensor

import skipkernels as sk
from skipkernels import retrieval, testing

C = 13


def sorted_whole(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, class_ids = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :k], class_ids[:, :k]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("k", [1, 2, 5, 39, 40])
def test_top_k_logits_equal_ones_by_class(k, chunk, monkeypatch):
    """Products of small integers are exact, and most are equal."""
    monkeypatch.setattr(retrieval, "_SCORES", 6 * chunk)
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (6, 40))
    expected, class_ids = sorted_whole(image @ text.T, k)
    assert (expected[:, 1:] == expected[:, :-1]).any() or k == 1
    got = retrieval.top_k_logits(image, text, k)
    assert got[0].equal(expected) and got[1].equal(class_ids)
    assert got[0].equal((image @ text.T).topk(k).values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_k_equals_predict(dtype, monkeypatch):
    clip, images = sk.SkipCLIP(tiny_clip(dtype), tiny_tokens(C), skip_layers=1), tiny_batch(5, C, dtype)[0]
    whole = clip.predict(images)
    for chunk in (1, 4, C):
        monkeypatch.setattr(retrieval, "_SCORES", chunk * len(images))
        for x in (images, clip.encode_lower(images)):
            for k in (1, 4, C):
                logits, class_ids = clip.top_k(x, k)
                expected = sorted_whole(whole, k)
                # A product with fewer columns may add in another order: logits of 14 to a few units of rounding.
                torch.testing.assert_close(logits, expected[0], rtol=0, atol=100 * torch.finfo(dtype).eps)
                assert class_ids.equal(expected[1]) and class_ids.dtype == torch.int64


def test_top_k_memory_does_not_grow_with_classes(monkeypatch):
    clip, (images, _) = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1), tiny_batch(64, C)
    features, classes = clip.encode_lower(images.float()), 200_000
    embeddings = torch.nn.functional.normalize(torch.randn(classes, 12), dim=1)
    monkeypatch.setattr(clip.texts, "kept_embeddings", lambda: embeddings)
    logits_bytes = 4 * len(images) * classes
    assert testing.allocated_bytes(lambda: clip.predict(features)) >= logits_bytes
    # A chunk of 2²² logits of four bytes; the rest are activations and candidates.
    assert testing.allocated_bytes(lambda: clip.top_k(features, 5)) <= (4 << 22) + (1 << 20) < logits_bytes / 2
    expected = clip.predict(features).topk(5)
    logits, class_ids = clip.top_k(features, 5)
    torch.testing.assert_close(logits, expected.values, rtol=0, atol=1e-5)
    assert (class_ids == expected.indices).float().mean() > 0.99  # equal but for logits that rounding swaps


@pytest.mark.parametrize("k", [0, C + 1])
def test_top_k_out_of_range(k):
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1)
    with pytest.raises(ValueError, match=rf"top_k: k must be in \[1, C=13\]; got {k}"):
        clip.top_k(tiny_batch(2, C)[0], k)


def test_top_k_shows_logits_that_are_not_finite(monkeypatch):
    monkeypatch.setattr(retrieval, "_SCORES", 4)
    text = torch.ones(C, 3)
    for class_id in (0, 7, C - 1):
        spoiled = text.clone()
        spoiled[class_id] = torch.nan
        for k in (1, 3):
            assert retrieval.top_k_logits(torch.ones(2, 3), spoiled, k)[0][:, 0].isnan().all()
