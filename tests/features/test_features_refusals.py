"""Refusals of caches: what is opened, built or read, the error, and words of it."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import skipkernels as sk
from skipkernels.app.data.images import Images
from skipkernels.features import CacheError
from tests.features.caches import build, images, pictures, skip_clip
from tests.hugging_face_models import siglip
from tests.models import tiny_clip

GOOD = pictures(1)[0]


# ---- a cache that exists ---------------------------------------------------------------------------------------------


def changed(name: str) -> nn.Module:
    model = tiny_clip(torch.float32)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[3] += 1e-3
    return model


def hooked() -> nn.Module:
    model = tiny_clip(torch.float32)
    model.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda module, args, out: out * 1.1)
    return model


def of_clip(make: Callable[[], nn.Module], skip: int = 1) -> Callable[[Path], object]:
    return lambda folder: sk.FeatureCache.open(folder, skip_clip(make(), skip))


def test_open_with_a_model_that_is_no_skip_clip(folder):
    with pytest.raises(TypeError, match=r"^FeatureCache.open: clip must be a SkipCLIP; got CLIP"):
        sk.FeatureCache.open(folder, tiny_clip())


NO_LABELS = TensorDataset(images().tensors[0], torch.zeros(23, dtype=torch.int64))
OPENED: list[tuple[Callable[[Path], object], str]] = [
    (of_clip(partial(changed, "visual.conv1.weight")), "differs in image embedding"),
    (of_clip(partial(changed, "visual.transformer.resblocks.0.mlp.c_fc.bias")), "differs in image lower blocks"),
    (of_clip(partial(tiny_clip, torch.float32), 2), r"differs in image skipped blocks \(1 there, 2 here\)"),
    (of_clip(partial(tiny_clip, torch.float32, quick_gelu=True)), "computes other features from the same weights"),
    (of_clip(hooked), "computes other features from the same weights"),
    (of_clip(lambda: siglip().float()), "differs in image tower"),
    (lambda at: sk.FeatureCache.open(at, dataset=images(seed=1)), "differs in images. Choose another folder, or"),
    (lambda at: sk.FeatureCache.open(at, dataset=images(22)), r"number of images \(23 there, 22 here\)"),
    (lambda at: build(at, resume=True, seed=1), r"differs in seed \(0 there, 1 here\)"),
    (lambda at: build(at, resume=True, batch_size=5), r"differs in batch size \(4 there, 5 here\)"),
    (lambda at: build(at, resume=True, dtype="bf16"), r"differs in dtype \(fp32 there, bf16 here\)"),
    (lambda at: build(at, NO_LABELS, resume=True), "differs in labels"),
]


@pytest.mark.parametrize(("call", "words"), OPENED, ids=[words for _, words in OPENED])
def test_other_cache_is_refused(folder, call, words):
    with pytest.raises(CacheError, match=f"^{re.escape(str(folder))}: .*{words}"):
        call(folder)


# ---- arguments -------------------------------------------------------------------------------------------------------

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "fp8"}, "dtype must be one of fp32, fp16, bf16, int8; got 'fp8'"),
    ({"batch_size": 0}, "batch_size must be at least 1, a whole number; got 0"),
    ({"workers": 1.0}, r"workers must be at least 0, a whole number; got 1\.0"),
    ({"dataset": []}, "dataset must be map-style, .* at least one image; got list"),
    ({"dataset": iter([])}, "dataset must be map-style"),
    ({"clip": skip_clip(skip=0)}, "with skip_layers=0 the image embedding trains"),
]


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS, ids=[words for _, words in ARGUMENTS])
def test_build_is_refused(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=f"^FeatureCache.build: {words}"):
        build(tmp_path / "store", **arguments)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("arguments", [{"refresh": "always"}, {"batch_size": 0}, {"seed": -1}, {"dataset": iter([])}])
def test_cache_in_memory_is_refused(arguments):
    with pytest.raises(ValueError, match=f"^FeatureCache.in_memory: {next(iter(arguments))} must be "):
        sk.FeatureCache.in_memory(**{"dataset": images(), **arguments})


SUBSETS: list[tuple[Tensor, type[Exception], str]] = [
    (torch.ones(23, dtype=torch.bool), TypeError, r"must be int64; got torch.bool. Use mask.nonzero\(\)"),
    (torch.tensor([[3]]), ValueError, r"must be \[m\]"),
    (torch.arange(0), ValueError, r"must be \[m\]"),
    (torch.tensor([0, 23]), IndexError, "are numbered from 0 to 22; got 0 to 23"),
    (torch.tensor([-1]), IndexError, "are numbered from 0 to 22; got -1 to -1"),
]


@pytest.mark.parametrize(("numbers", "error", "words"), SUBSETS)
def test_subset_is_refused(folder, numbers, error, words):
    with pytest.raises(error, match=f"^FeatureCache.subset: images {words}"):
        sk.FeatureCache.open(folder).subset(numbers)


def test_lists_as_sampler_have_no_state_and_are_not_divided(folder):
    cache, lists = sk.FeatureCache.open(folder), [[0, 1], [2, 3]]
    with pytest.raises(TypeError, match=r"^FeatureLoader\.state_dict: this sampler has no state_dict"):
        cache.loader(sampler=lists).state_dict()
    with pytest.raises(ValueError, match="^FeatureCache.loader: lists of image numbers are not divided; got rank=0"):
        cache.loader(sampler=lists, rank=0, world_size=2)


# ---- items of a dataset ----------------------------------------------------------------------------------------------


class Broken(TensorDataset):
    """Images of which one item is replaced, or raises an error."""

    def __init__(self, item: Any):
        super().__init__(*images(9).tensors)
        self._item = item

    def __getitem__(self, number: int) -> Any:
        if number != 5:
            return super().__getitem__(number)
        if isinstance(self._item, Exception):
            raise self._item
        return self._item


ITEMS: list[tuple[Any, str]] = [
    ((Image.new("RGB", (16, 16)), 1), r"image of item 5 .* a floating-point tensor .*; got Image.*preprocessing"),
    ((GOOD[0], 1), r"image of item 5 .* tensor \[3, height, width\]; got torch.float32 \[16, 16\]"),
    ((pictures(1, 8)[0], 1), r"item 5 .*\[3, 8, 8\]"),
    ((GOOD, 2**70), r"label of item 5 .* of 64 bits; got 1180591620717411303424"),
    ((GOOD.byte(), 1), r"image of item 5 .* floating-point tensor .*; got torch\.uint8 "),
    ((GOOD, 1, 2), r"item 5 of the dataset must be \(image, label\); got tuple"),
    (OSError("no such disk"), r"item 5 of the dataset cannot be loaded: OSError\('no such disk'\)"),
    (
        (torch.full_like(GOOD, torch.nan), 1),
        r"features of row 5 are NaN, or out of the range of fp32\. Check the input",
    ),
]


@pytest.mark.parametrize(("item", "words"), ITEMS, ids=[words for _, words in ITEMS])
def test_item_is_refused(tmp_path, item, words):
    with pytest.raises(CacheError, match=words) as caught:
        build(tmp_path, Broken(item), identity="broken")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("item", "words"), [ITEMS[0], ITEMS[6]], ids=["item", "error"])
def test_item_is_refused_by_a_worker(tmp_path, item, words):
    with pytest.raises(CacheError, match=f"^FeatureCache: .*{words}") as caught:
        build(tmp_path, Broken(item), identity="broken", workers=1)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_error_of_a_dataset_of_this_package_is_unchanged(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    files = Images.of_files(tmp_path, ["a.png", "b.png"], [0, 1]).with_transform(lambda image: GOOD)
    path = re.escape(str(tmp_path / "b.png"))
    with pytest.raises(CacheError, match=rf"^{path}: can.*t be read as an image .*Replace or remove it\.$"):
        build(tmp_path / "store", files, identity="files", workers=1)


def test_images_of_another_size_are_refused(tmp_path):
    message = r"images must be \[3, 16, 16\], the model's input size; got \[3, 32, 32\]"
    with pytest.raises(CacheError, match=message) as kept:
        build(tmp_path, images(9, 32), workers=2)
    assert not multiprocessing.active_children() and kept.value, "a kept error keeps no processes"


def test_features_out_of_the_range_of_fp16_are_refused(tmp_path):
    model = tiny_clip(torch.float32)
    model.visual.ln_pre = nn.Identity()  # otherwise the scale of an image has no effect
    clip, item = skip_clip(model), (GOOD * 1e6, 1)
    message = r"features of row 5 are NaN, or out of the range of fp16\. Use dtype=.bf16"
    with pytest.raises(CacheError, match=message):
        build(tmp_path / "fp16", Broken(item), clip, identity="large", dtype="fp16")
    build(tmp_path / "bf16", Broken(item), clip, identity="large", dtype="bf16")
