"""State of SkipCLIP beside the weights: sampler, prototypes and class weights; dtypes and devices."""

from __future__ import annotations

import copy

import pytest
import safetensors.torch
import torch

import skipkernels as sk
from skipkernels.clip import builder
from skipkernels.towers.base import Tower
from tests.clip.clips import C, class_weights, drawn, make_clip
from tests.models import tiny_batch, tiny_clip, tiny_tokens


@pytest.mark.parametrize("tail", ["resample", "fixed"])
def test_state_dict_continues_the_draws(tail):
    clip = make_clip(tail=tail)
    drawn(clip)
    state = safetensors.torch.load(safetensors.torch.save(clip.state_dict()))  # the format of trainers
    fresh = make_clip(seed=5, tail=tail)
    assert not fresh.prototypes.equal(clip.prototypes)
    fresh.load_state_dict(state)
    assert fresh.prototypes.equal(clip.prototypes)
    assert drawn(fresh) == drawn(clip)


def test_load_state_dict_without_sampler_warns():
    clip, old = make_clip(), make_clip().state_dict()
    del old["_extra_state"]
    before = clip.get_extra_state()
    with pytest.warns(UserWarning, match="no sampler and no prototypes"):
        clip.load_state_dict(old)
    assert clip.get_extra_state().equal(before)


# ---- dtypes and devices ----------------------------------------------------------------------------------------------


def test_bfloat16_keeps_prototypes_in_fp32():
    clip, (images, labels) = make_clip(dtype=torch.float32), tiny_batch(2, C, torch.float32)
    prototypes = clip.prototypes.clone()
    clip.bfloat16()
    assert clip.prototypes.equal(prototypes)
    assert clip(clip.encode_lower(images), labels).loss.isfinite()


def test_class_weight_is_a_copy_that_moves():
    given = class_weights()
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1, class_weight=given)
    given.zero_()
    wide, batch = copy.deepcopy(clip).double(), tiny_batch(3, C)
    assert wide(*batch, return_logits=True).logits.dtype == wide.eval()(*batch).logits.dtype == torch.float64
    assert clip.bfloat16().class_weight.equal(class_weights()) and "class_weight" not in clip.state_dict()
    assert copy.deepcopy(clip).class_weight.equal(class_weights())
    with torch.autocast("cpu", torch.bfloat16):
        assert clip(*tiny_batch(3, C, torch.bfloat16)).loss.isfinite()
    assert clip.to("meta").class_weight.device.type == "meta"


def test_construction_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(9), skip_layers=1)
        half = clip.class_embeddings()
    torch.testing.assert_close(clip.prototypes, clip.class_embeddings())
    assert not half.equal(clip.class_embeddings()), "embeddings from autocast are not reused in fp32"


def test_refresh_brings_the_lower_parts_to_the_device_of_the_model(monkeypatch):
    """The comparison with the model itself then runs on one device."""
    clip, moves = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=1, lower_device="cpu"), []
    move, read = Tower.move_lower, builder.build
    monkeypatch.setattr(Tower, "move_lower", lambda self, device=None: moves.append(device) or move(self, device))
    monkeypatch.setattr(builder, "build", lambda *given, **options: moves.append("read") or read(*given, **options))
    clip.refresh()
    assert moves == [torch.device("cpu")] * 2 + ["read"] + [None] * 2


@pytest.mark.parametrize("tail", ["resample", "fixed"])
def test_tensors_are_not_made_on_the_default_device(tail, tmp_path):
    """On the meta device a tensor has no values, so that reading one raises an error."""
    images, labels = tiny_batch(4, C, torch.float32)
    expected = make_clip(torch.float32, keep_ratio=0.4, tail=tail)(images, labels)
    model, tokens = tiny_clip(torch.float32), tiny_tokens(C)
    with torch.device("meta"):
        clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=0.4, decay=3.0, tail=tail, text_cache=tmp_path)
        out = clip(images, labels)
        out.loss.backward()
        sk.FusedSGD(clip.parameter_groups(text_lr=0.0, image_lr=0.0)).step()
        assert clip.eval()(images, labels).logits.device == clip.predict(images).device == images.device
        sk.pairs.pair_loss(clip.train(), images, labels)
        clip.load_state_dict(clip.state_dict())
        clip.refresh()
    assert out.class_ids.equal(expected.class_ids) and out.loss.equal(expected.loss)


@pytest.mark.parametrize("alone", [True, False], ids=["the model alone", "SkipCLIP"])
def test_another_dtype_computes_the_text_features_again(alone):
    images, labels = tiny_batch(4, C)
    expected = make_clip()(images, labels).loss
    clip = make_clip(torch.float32)
    (clip.model.double() if alone else clip.type(torch.float64))
    torch.testing.assert_close(clip(images, labels).loss, expected, rtol=1e-6, atol=0)  # weights rounded to fp32
