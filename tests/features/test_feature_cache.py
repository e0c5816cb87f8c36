"""Building and opening of a cache: features of every model family, and refusals that name what differs."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import open_clip
import pytest
import timm_models
import torch
import transformers
from caches import CLASSES, Drawn, build, images, pictures, skip_clip
from models import openai_models, tiny_clip
from PIL import Image
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import skipkernels as sk
from skipkernels.app.data import LabelledImages
from skipkernels.features import CacheError
from tests.processes import forkserver

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 24), "num_classes": 12}
SIGLIP = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


def siglip() -> nn.Module:
    text = {**SIGLIP, "vocab_size": 60, "max_position_embeddings": 77, "projection_size": 24}
    vision = {**SIGLIP, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))


def openai_clip() -> nn.Module:
    torch.manual_seed(0)
    return openai_models().CLIP(12, 16, 3, 64, 8, 77, 60, 16, 2, 3).float()


def pooled_by_attention() -> nn.Module:
    """SigLIP's image tower as in timm."""
    torch.manual_seed(0)
    trunk = VisionTransformer(**VIT, class_token=False, global_pool="map", act_layer="gelu_tanh", num_classes=12)
    return timm_models.timm_clip(trunk).float()


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return timm_models.timm_clip(ConvNeXt(**CONVNEXT), 32).float()


def half(dtype: torch.dtype) -> nn.Module:
    model = open_clip.CLIP(12, tiny_vision(), tiny_text(), cast_dtype=dtype)
    model.load_state_dict(tiny_clip(torch.float32).state_dict())
    open_clip.model.convert_weights_to_lp(model, dtype)
    return model


def tiny_vision() -> dict:
    return {"image_size": 16, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8}


def tiny_text() -> dict:
    return {"context_length": 77, "vocab_size": 60, "width": 16, "heads": 2, "layers": 3}


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, skipped blocks, image size
    "open_clip": (partial(tiny_clip, torch.float32), 1, 16),
    "openai": (openai_clip, 2, 16),
    "siglip": (siglip, 1, 16),
    "timm": (pooled_by_attention, 2, 16),
    "maps": (convolutions, 2, 32),
    "fp64": (tiny_clip, 1, 16),
    "bf16": (partial(half, torch.bfloat16), 1, 16),
}


def rows(cache: sk.FeatureCache) -> torch.Tensor:
    return cache.table.rows(torch.arange(len(cache)))


def by_hand(clip: sk.SkipCLIP, pixels: torch.Tensor, batch_size: int = 4) -> torch.Tensor:
    return torch.cat([clip.encode_lower(part) for part in pixels.split(batch_size)])


# ---- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_features_equal_those_of_the_model(tmp_path, family):
    make, skip, size = family
    dataset, clip = images(10, size), skip_clip(make(), skip)
    cache = build(tmp_path, dataset, clip)
    right = by_hand(clip, dataset.tensors[0])
    assert cache.shape == right.shape[1:] and cache.dtype == right.dtype and len(cache) == 10
    expected = right.float().to(right.dtype)  # fp64 is stored as fp32
    assert rows(cache).equal(expected)
    assert cache.labels.equal(dataset.tensors[1])
    reopened = sk.FeatureCache.open(tmp_path, clip, dataset, verify=True)
    assert reopened.verify() is None
    for features, labels in reopened.loader(4, "sequential"):
        assert features.dtype == right.dtype and clip(features, labels).loss.isfinite()
        break
    assert sk.FeatureCache.open(tmp_path, skip_clip(make(), skip)).shape == cache.shape


@pytest.mark.parametrize("family", ["open_clip", "maps"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("fp16", 2**-11),  # half a step of 10 mantissa bits
        ("bf16", 2**-8),  # 7 mantissa bits
        ("int8", 1 / 254),  # half of 1 / 127 of the largest number of a token
    ],
)
def test_features_are_rounded_to_the_storage_dtype(tmp_path, family, dtype, tolerance):
    make, skip, size = FAMILIES[family]
    dataset, clip = images(10, size), skip_clip(make(), skip)
    got, right = rows(build(tmp_path, dataset, clip, dtype=dtype)), by_hand(clip, dataset.tensors[0])
    assert got.dtype == torch.float32
    scale = right.flatten(2).abs().amax(dim=2).view(*right.shape[:2], *[1] * (right.ndim - 2))
    allowed = tolerance * (scale if dtype == "int8" else right.abs() + 2**-14)  # fp16 is subnormal below
    assert ((got - right).abs() <= allowed * (1 + 1e-6)).all()
    assert not got.equal(right)


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


def dropping() -> nn.Module:
    """A model in training mode with dropout below the cut."""
    torch.manual_seed(0)
    model = timm_models.timm_clip(VisionTransformer(**VIT, num_classes=12, pos_drop_rate=0.5)).float()
    return model.train()


@pytest.mark.parametrize(
    ("make", "skip", "size"),
    [(dropping, 1, 16), (lambda: tiny_clip(torch.float32, vision={"patch_dropout": 0.5}).train(), 1, 16)],
    ids=["dropout", "patches"],
)  # fmt: skip
def test_build_does_not_change_the_model(tmp_path, make, skip, size):
    model = make()
    clip = skip_clip(model, skip)
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cache = build(tmp_path, images(8, size), clip)
    assert modes == {name: module.training for name, module in model.named_modules()} and model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert rows(cache).equal(by_hand(clip, images(8, size).tensors[0]))


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


def test_cache_can_be_pickled_after_reading(tmp_path):
    cache = build(tmp_path)
    right = [cache[item] for item in range(len(cache))]
    loader = DataLoader(cache, batch_size=8, num_workers=1, multiprocessing_context=forkserver())
    features, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert features.equal(torch.stack([one for one, _ in right])) and labels.tolist() == [label for _, label in right]


def test_in_memory_equals_the_model(monkeypatch, tmp_path):
    clip, done = skip_clip(), []
    cache = sk.FeatureCache.in_memory(images(), clip.encode_lower, batch_size=4, progress=done.append)
    assert sum(done) == len(cache) == 23 and cache.table.folder is None and cache.verify() is None
    right = by_hand(clip, images().tensors[0])
    assert torch.stack([features for features, _ in cache]).equal(right)
    assert cache[-1][0].equal(right[22]) and cache[-1][1] == 22 % CLASSES
    assert cache.shape == right.shape[1:] and cache.dtype == torch.float32
    assert repr(cache) == f"FeatureCache(23 images, {list(right.shape[1:])} torch.float32, in memory)"
    with pytest.raises(IndexError, match="image 23 is outside"):
        cache[23]
    assert torch.cat([features for features, _ in cache.loader(5, "sequential", dtype=torch.bfloat16)]).equal(
        right.bfloat16()
    )
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1 kB\n")
    monkeypatch.setattr("skipkernels.memory._PROC", tmp_path)
    with pytest.raises(MemoryError, match=r"23 items of \[3, 16, 16\] torch.float32 take .* Use FeatureCache.build"):
        sk.FeatureCache.in_memory(images())


def test_random_transforms_are_reproducible(tmp_path):
    cache = build(tmp_path / "one", Drawn(8))
    assert not rows(cache).equal(rows(build(tmp_path / "other", Drawn(8), seed=1)))
    again = build(tmp_path / "two", Drawn(8), workers=2)
    assert rows(again).equal(rows(cache))


def test_build_does_not_change_the_generators(tmp_path):
    def state() -> tuple:
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    clip = skip_clip()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = state()
    for draw in (lambda: None, torch.rand, np.random.rand, random.random):
        draw() if draw is not torch.rand else draw(1)
    expected = state()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    build(tmp_path, Drawn(8), clip)
    assert state() == before != expected


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "store"
    build(path)
    return path


def test_open_ignores_weights_above_the_cut(folder):
    model = tiny_clip(torch.float32)
    clip = skip_clip(model)
    with torch.no_grad():
        for parameter in clip.trainable_parameters():
            parameter.add_(1)
        model.token_embedding.weight.add_(1)
    sk.FeatureCache.open(folder, clip, images())


def changed(name: str) -> nn.Module:
    model = tiny_clip(torch.float32)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[3] += 1e-3
    return model


def hooked() -> nn.Module:
    model = tiny_clip(torch.float32)
    model.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda module, args, out: out * 1.1)
    return model


@pytest.mark.parametrize(
    ("make", "skip", "message"),
    [
        (partial(changed, "visual.conv1.weight"), 1, "differs in image embedding"),
        (partial(changed, "visual.transformer.resblocks.0.mlp.c_fc.bias"), 1, "differs in image lower blocks"),
        (partial(tiny_clip, torch.float32), 2, r"differs in image skipped blocks \(1 there, 2 here\)"),
        (partial(tiny_clip, torch.float32, quick_gelu=True), 1, "computes other features from the same weights"),
        (hooked, 1, "computes other features from the same weights"),
        (siglip, 1, "differs in image tower"),
    ],
    ids=["patches", "block", "cut", "activation", "hook", "family"],
)
def test_open_refuses_another_model_below_the_cut(folder, make, skip, message):
    with pytest.raises(CacheError, match=f"^{folder}: .*{message}"):
        sk.FeatureCache.open(folder, skip_clip(make(), skip))


def test_open_allows_other_rounding_in_half_precision(tmp_path):
    """Another device rounds differently; norms and positions are in fp32."""
    dtype = torch.bfloat16
    clip = skip_clip(half(dtype))
    build(tmp_path, images(4), clip)
    values = json.loads((tmp_path / "identity.json").read_text())
    probe = torch.tensor(values["probe"])
    step = torch.finfo(dtype).eps
    for off, refused in ((2 * step, False), (0.2, True)):
        (tmp_path / "identity.json").write_text(json.dumps(values | {"probe": (probe * (1 + off)).tolist()}))
        with pytest.raises(CacheError, match="computes other features") if refused else contextlib.nullcontext():
            sk.FeatureCache.open(tmp_path, clip)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (images(seed=1), "holds a cache that differs in images"),
        (images(22), r"holds a cache that differs in number of images \(23 there, 22 here\)"),
    ],
    ids=["pixels", "count"],
)
def test_open_refuses_another_dataset(folder, dataset, message):
    with pytest.raises(CacheError, match=f"^{folder}: {message}.*Choose another folder, or delete this one"):
        sk.FeatureCache.open(folder, dataset=dataset)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"batch_size": 5}, r"batch size \(4 there, 5 here\)"),
        ({"dtype": "bf16"}, r"dtype \(fp32 there, bf16 here\)"),
        ({"dataset": TensorDataset(images().tensors[0], torch.zeros(23, dtype=torch.int64))}, "labels"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resume_refuses_other_arguments(folder, changes, message):
    with pytest.raises(CacheError, match=f"holds a cache that differs in {message}"):
        build(folder, resume=True, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "fp8"}, "dtype must be one of fp32, fp16, bf16, int8; got 'fp8'"),
        ({"refresh": "always"}, "refresh must be"),
        ({"batch_size": 0}, "batch_size must be at least 1, a whole number; got 0"),
        ({"workers": 1.0}, r"workers must be at least 0, a whole number; got 1\.0"),
        (
            {"resume": True, "overwrite": True},
            "resume continues a cache, and overwrite replaces it; pass only one",
        ),
        ({"dataset": []}, "dataset must be map-style, .* at least one image; got list"),
        ({"dataset": iter([])}, "dataset must be map-style"),
        ({"clip": skip_clip(skip=0)}, "with skip_layers=0 the image embedding trains"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_invalid_argument_is_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=f"^FeatureCache.build: {message}"):
        build(tmp_path / "store", **arguments)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("arguments", [{"refresh": "always"}, {"batch_size": 0}, {"seed": -1}], ids="".join)
def test_in_memory_refuses(arguments):
    with pytest.raises(ValueError, match=f"^FeatureCache.in_memory: {''.join(arguments)} must be"):
        sk.FeatureCache.in_memory(images(), **arguments)


# ---- invalid items ---------------------------------------------------------------------------------------------------


class Broken(TensorDataset):
    """Images of which one item is replaced, or raises an error."""

    def __init__(self, item: Any, number: int = 5):
        super().__init__(*images(9).tensors)
        self.number, self._item = number, item

    def __getitem__(self, number: int) -> Any:
        if number != self.number:
            return super().__getitem__(number)
        if isinstance(self._item, Exception):
            raise self._item
        return self._item


GOOD = pictures(1)[0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((Image.new("RGB", (16, 16)), 1), r"image of item 5 .* a floating-point tensor .*; got Image.*preprocessing"),
        ((GOOD[0], 1), r"image of item 5 .* tensor \[3, height, width\]; got torch.float32 \[16, 16\]"),
        ((pictures(1, 8)[0], 1), r"item 5 .*\[3, 8, 8\]"),
        ((GOOD, 2**70), r"label of item 5 .* of 64 bits; got 1180591620717411303424"),
        ((GOOD.byte(), 1), r"image of item 5 .* floating-point tensor .*; got torch\.uint8 "),
        ((GOOD, 1, 2), r"item 5 of the dataset must be \(image, label\); got tuple"),
        (OSError("no such disk"), r"item 5 of the dataset cannot be loaded: OSError\('no such disk'\)"),
    ],
    ids=["picture", "grey", "small", "huge", "bytes", "three", "error"],
)  # fmt: skip
def test_invalid_item_is_named(tmp_path, item, message, workers):
    with pytest.raises(CacheError, match=f"^FeatureCache: .*{message}") as caught:
        build(tmp_path, Broken(item), identity="broken", workers=workers)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_error_of_a_dataset_of_this_package_is_unchanged(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    files = LabelledImages(tmp_path, ["a.png", "b.png"], [0, 1], transform=lambda image: GOOD)
    with pytest.raises(CacheError, match=rf"^{tmp_path}/b\.png: can.*t be read as an image .*Replace or remove it\.$"):
        build(tmp_path / "store", files, identity="files", workers=1)


def test_images_of_another_size_are_refused(tmp_path):
    size, workers = 32, 2
    message = rf"images must be \[3, 16, 16\], the model's input size; got \[3, {size}, {size}\]"
    with pytest.raises(CacheError, match=message) as kept:
        build(tmp_path, images(9, size), workers=workers)
    assert not multiprocessing.active_children() and kept.value, "a kept error keeps no processes"


def test_features_that_are_nan_are_named(tmp_path):
    item = torch.full_like(GOOD, torch.nan), 1
    with pytest.raises(CacheError, match=r"features of item 5 reach nan, out of the range of fp32\. Check the image"):
        build(tmp_path, Broken(item), identity="nan")


def test_features_out_of_the_range_of_fp16_are_named(tmp_path):
    model = tiny_clip(torch.float32)
    model.visual.ln_pre = nn.Identity()  # otherwise the scale of an image has no effect
    clip, item = skip_clip(model), (GOOD * 1e6, 1)
    with pytest.raises(
        CacheError, match=r"features of item 5 reach .*e\+.*, out of the range of fp16\. Use dtype=.bf16"
    ):
        build(tmp_path, Broken(item), clip, identity="large", dtype="fp16")
    build(tmp_path, Broken(item), clip, identity="large", dtype="bf16", overwrite=True)
