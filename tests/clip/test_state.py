"""State of SkipCLIP beside the weights: sampler and prototypes; dtypes and moves."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from tests.clip.clips import C, drawn, make_clip
from tests.models import tiny_batch


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
    with pytest.warns(UserWarning, match="no sampler and no prototypes"):
        clip.load_state_dict(old)


def test_bfloat16_keeps_prototypes_in_fp32():
    clip, (images, labels) = make_clip(dtype=torch.float32), tiny_batch(2, C, torch.float32)
    prototypes = clip.prototypes.clone()
    clip.bfloat16()
    assert clip.prototypes.equal(prototypes)
    assert clip(clip.encode_lower(images), labels).loss.isfinite()
