"""Parameters that train: of a frozen model, of adapters, of another SkipCLIP; models after an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from skipkernels.towers.families import open_clip as open_clip_towers
from tests.clip.clips import insert_lora
from tests.models import tiny_clip
from tests.towers.families import OPEN_CLIP


def with_adapters(block: int) -> nn.Module:
    """Return a frozen model with trainable LoRA of PEFT in the MLP of one block of each tower."""
    model = tiny_clip().requires_grad_(False)
    for stack in (model.visual.transformer, model.transformer):
        insert_lora(stack.resblocks[block], "c_proj")
    return model


def test_trainable_upper_warns_of_unfreezing():
    model = tiny_clip().requires_grad_(False)
    with pytest.warns(UserWarning, match=r"sets requires_grad of 54 parameters above the cut that were frozen \("):
        OPEN_CLIP.cut(1, model)
    assert model.text_projection.requires_grad and not model.visual.conv1.weight.requires_grad


def test_trainable_upper_ordinary_model_without_warning(recwarn):
    model = tiny_clip()
    OPEN_CLIP.cut(1, model)
    OPEN_CLIP.cut(2, model)
    assert not recwarn.list


def test_another_skipclip_froze_the_first_block():
    model = tiny_clip()
    first = OPEN_CLIP.cut(1, model)
    OPEN_CLIP.cut(2, model)
    with pytest.raises(RuntimeError, match="the first block above the cut was frozen .* by another SkipCLIP"):
        first.eval()
    first.refresh()
    OPEN_CLIP.check_step(first)


def test_frozen_copy_evaluates():
    clip = OPEN_CLIP.cut(1, tiny_clip())
    teacher = copy.deepcopy(clip).requires_grad_(False)
    images = OPEN_CLIP.images()
    assert teacher.eval().predict(images).equal(clip.predict(images))
    with pytest.raises(RuntimeError, match="the first block above the cut was frozen"):
        teacher.train().parameter_groups(text_lr=0.1, image_lr=0.1)


@pytest.mark.parametrize("kept", ["ln_", "bias"])
def test_trainable_as_is_norms_or_biases(kept):
    model = tiny_clip()
    below = ("ln_pre", "resblocks.0")
    chosen = {name for name, _ in model.named_parameters() if kept in name and not any(x in name for x in below)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    clip = OPEN_CLIP.cut(1, model, trainable="as_is")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == chosen
    assert clip.reductions["image.fused_block"].enabled and clip.reductions["text.shared_prefix"].enabled
    OPEN_CLIP.check_step(clip)


def test_trainable_as_is_warns_of_adapters_below_the_cut():
    with pytest.warns(UserWarning, match="4 trainable parameters below the cut are frozen"):
        OPEN_CLIP.cut(1, with_adapters(0), trainable="as_is")


def test_training_below_the_cut_is_an_error():
    model = tiny_clip()
    clip = OPEN_CLIP.cut(1, model)
    for part in (model.visual.transformer, model.transformer, clip):
        part.requires_grad_(True)
        for use in (clip.check_model, clip.eval, lambda: clip.parameter_groups(text_lr=0.1, image_lr=0.1)):
            with pytest.raises(RuntimeError, match="requires_grad was set on parameters below the cut"):
                use()
        clip.refresh()
        OPEN_CLIP.check_step(clip.train())


def test_failed_construction_restores_requires_grad(monkeypatch):
    model = tiny_clip()
    model.ln_final.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    monkeypatch.setattr(
        open_clip_towers.OpenClipImageTower, "reference_forward", lambda self, x: torch.ones(len(x), 12).double()
    )
    with pytest.warns(UserWarning, match="sets requires_grad of 2 parameters"), pytest.raises(RuntimeError):
        OPEN_CLIP.cut(1, model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
