"""Building and opening of a cache: features of every model family, and refusals that name what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import skipkernels as sk
from skipkernels.features import CacheError
from tests.features.caches import CLASSES, Drawn, build, images, skip_clip
from tests.hugging_face_models import siglip
from tests.models import half_precision_clip, tiny_clip
from tests.timm_models import convnext

MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, skipped blocks, image size
    "open_clip": (partial(tiny_clip, torch.float32), 1, 16),
    "siglip": (lambda: siglip().float(), 1, 16),
    "maps": (lambda: convnext().float(), 2, 32),
    "fp64": (tiny_clip, 1, 16),
    "bf16": (partial(half_precision_clip, torch.bfloat16), 1, 16),
}


def rows(cache: sk.FeatureCache) -> torch.Tensor:
    return cache.table.rows(torch.arange(len(cache)))


def by_hand(clip: sk.SkipCLIP, pixels: torch.Tensor, batch_size: int = 4) -> torch.Tensor:
    return torch.cat([clip.encode_lower(part) for part in pixels.split(batch_size)])


# ---- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "skip", "size"), MODELS.values(), ids=MODELS)
def test_features_equal_those_of_the_model(tmp_path, make, skip, size):
    dataset, clip = images(10, size), skip_clip(make(), skip)
    cache = build(tmp_path, dataset, clip)
    right = by_hand(clip, dataset.tensors[0])
    assert cache.shape == right.shape[1:] and cache.dtype == right.dtype and len(cache) == 10
    expected = right.float().to(right.dtype)  # fp64 is stored as fp32
    assert rows(cache).equal(expected)
    assert cache.labels.equal(dataset.tensors[1])
    reopened = sk.FeatureCache.open(tmp_path, clip, dataset, verify=True)
    features, labels = next(iter(reopened.loader(4, "sequential")))
    assert features.dtype == right.dtype and clip(features, labels).loss.isfinite()
    assert sk.FeatureCache.open(tmp_path, skip_clip(make(), skip)).shape == cache.shape


def test_features_under_autocast(tmp_path):
    dataset, clip = images(10), skip_clip()
    with torch.autocast("cpu", torch.bfloat16):
        cache = build(tmp_path, dataset, clip)
        right = by_hand(clip, dataset.tensors[0])
    assert rows(cache).equal(right.to(cache.dtype)) and cache.dtype == right.dtype
    assert not by_hand(clip, dataset.tensors[0]).equal(right), "autocast rounds"
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(CacheError, match=r"differs in autocast \(bf16 there, none here\)"):
        build(tmp_path, dataset, clip, resume=True)
    with pytest.raises(CacheError, match=r"differs in autocast"):
        sk.FeatureCache.open(tmp_path, clip, dataset)
    with torch.autocast("cpu", torch.bfloat16):
        sk.FeatureCache.open(tmp_path, clip, dataset)


# ---- labels and items ----------------------------------------------------------------------------------------------


def test_getitem(tmp_path):
    cache = build(tmp_path)
    everything = rows(cache)
    for item in (0, 5, 22, -1, -23):
        features, label = cache[item]
        assert features.equal(everything[item]) and label == (item % 23) % CLASSES and isinstance(label, int)
    for item in (23, -24):
        with pytest.raises(IndexError, match=rf"^FeatureCache: image {item} is outside 0…22\.$"):
            cache[item]
    assert len(list(cache)) == 23, "iteration ends after the last image"


def test_in_memory_equals_the_model():
    clip, done = skip_clip(), []
    cache = sk.FeatureCache.in_memory(images(), clip.encode_lower, batch_size=4, progress=done.append)
    assert sum(done) == len(cache) == 23 and cache.table.folder is None
    right = by_hand(clip, images().tensors[0])
    assert torch.stack([features for features, _ in cache]).equal(right)
    assert cache.shape == right.shape[1:] and cache.dtype == torch.float32
    assert repr(cache) == f"FeatureCache(23 images, {list(right.shape[1:])} torch.float32, in memory)"


def test_in_memory_takes_at_most_half_of_the_free_memory(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1 kB\n")
    monkeypatch.setattr("skipkernels.memory._PROC", tmp_path)
    with pytest.raises(MemoryError, match=r"23 items of \[3, 16, 16\] torch.float32 take .* Use FeatureCache.build"):
        sk.FeatureCache.in_memory(images())


def test_random_transforms_are_reproducible(tmp_path):
    cache = build(tmp_path / "one", Drawn(8))
    assert not rows(cache).equal(rows(build(tmp_path / "other", Drawn(8), seed=1)))
    again = build(tmp_path / "two", Drawn(8), workers=2)
    assert rows(again).equal(rows(cache))


# ---- other models ----------------------------------------------------------------------------------------------------


def test_open_ignores_weights_above_the_cut(folder):
    model = tiny_clip(torch.float32)
    clip = skip_clip(model)
    with torch.no_grad():
        for parameter in clip.trainable_parameters():
            parameter.add_(1)
        model.token_embedding.weight.add_(1)
    sk.FeatureCache.open(folder, clip, images())


def test_open_allows_other_rounding_in_half_precision(tmp_path):
    """Another device rounds differently; norms and positions are in fp32."""
    clip = skip_clip(half_precision_clip(torch.bfloat16))
    build(tmp_path, images(4), clip)
    values = json.loads((tmp_path / "identity.json").read_text())

    def open_with_probe(factor: float) -> None:
        probe = [factor * number for number in values["probe"]]
        (tmp_path / "identity.json").write_text(json.dumps(values | {"probe": probe}))
        sk.FeatureCache.open(tmp_path, clip)

    open_with_probe(1 + 2 * torch.finfo(torch.bfloat16).eps)
    with pytest.raises(CacheError, match="computes other features"):
        open_with_probe(1.2)
