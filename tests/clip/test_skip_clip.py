"""SkipCLIP as a module: what trains, copies, prediction, the step in two halves, names that trainers use."""

from __future__ import annotations

import copy
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import skipkernels as sk
from skipkernels import testing
from skipkernels.boundary import LostGradient
from skipkernels.towers.base import Cut
from tests.clip.clips import IMAGES, LABELS, C, assert_same_bits, make_clip, mixup, three_templates
from tests.models import tiny_batch, tiny_clip, tiny_tokens

# ---- training --------------------------------------------------------------------------------------------------------


def test_parameter_groups_replaced_parameters():
    model = tiny_clip()
    clip = sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    groups = clip.parameter_groups(text_lr=0.1, image_lr=0.1)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_skip_layers_fraction_and_pair():
    clip = sk.SkipCLIP(tiny_clip(text={"layers": 2}), tiny_tokens(4), skip_layers=(2, 0.5))
    assert (clip.images.tower.skip, clip.texts.tower.skip) == (2, 1)


def test_numbers_of_numpy():
    options = {"chunk": np.int64(7), "label_smoothing": np.float32(0.25)}
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(4), skip_layers=(np.int64(1), np.float32(0.5)), **options)
    expected = sk.SkipCLIP(tiny_clip(), tiny_tokens(4), skip_layers=(1, 0.5), chunk=7, label_smoothing=0.25)
    assert clip.images.tower.cut == expected.images.tower.cut and clip.texts.tower.cut == expected.texts.tower.cut
    batch = tiny_batch(3, 4)
    assert clip(*batch).loss.equal(expected(*batch).loss)


def test_cut_of_both_towers():
    options = {"memory": "min", "chunk": 7, "lower_device": torch.device("cpu")}
    clip = sk.SkipCLIP(tiny_clip(), three_templates(), skip_layers=(2, 1), **options)
    for _ in range(2):
        assert clip.images.tower.cut == Cut(skip=2, **options)
        assert clip.texts.tower.cut == Cut(skip=1, runs=3, **options)
        clip.refresh()
    clip.set_classes(tiny_tokens(C))
    assert clip.texts.tower.cut == Cut(skip=1, runs=1, **options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        LostGradient("run_frozen: no gradient passes the cut"),
    ],
    ids=["a GPU", "the CPU", "a gradient"],
)
def test_other_errors_are_not_of_the_size_of_images(error, monkeypatch):
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=1)
    monkeypatch.setattr(clip.images.tower, "lower", mock.Mock(side_effect=error))
    with pytest.raises(type(error)) as raised:
        clip.predict(torch.zeros(2, 3, 64, 64))
    assert raised.value is error


def step_of(clip: sk.SkipCLIP, optimizer: torch.optim.Optimizer, seed: int) -> None:
    clip(*tiny_batch(3, C, seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_exponential_average_of_the_weights():
    clip, (images, labels) = make_clip(), tiny_batch(5, C)
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1), momentum=0.9)
    average = AveragedModel(clip, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    states = []
    for seed in range(3):
        step_of(clip, optimizer, seed)
        average.update_parameters(clip)
        states.append(copy.deepcopy(clip.model.state_dict()))
    by_hand = states[0]
    for state in states[1:]:
        by_hand = {name: 0.75 * by_hand[name] + 0.25 * value for name, value in state.items()}
    expected = tiny_clip()
    expected.load_state_dict(by_hand)
    logits = expected.get_logits(images, tiny_tokens(C))[0].detach()
    torch.testing.assert_close(average.module.predict(images), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(average.eval()(images, labels).logits.detach(), logits, rtol=1e-9, atol=1e-9)
    assert not clip.predict(images).allclose(logits, rtol=1e-4)
    assert average.module.prototypes.equal(clip.prototypes)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda clip: pickle.loads(pickle.dumps(clip))], ids=["copy", "pickle"])
def test_copy_in_the_middle_of_training_goes_the_same_way(way):
    clip = make_clip(class_weight=torch.linspace(0.5, 1.5, C), label_smoothing=0.1)
    for _ in range(2):
        optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1))
        step_of(clip, optimizer, 0)
        twin = way(clip)
        other = torch.optim.SGD(twin.parameter_groups(text_lr=0.1, image_lr=0.1))
        for seed in (1, 2):
            step_of(clip, optimizer, seed)
            step_of(twin, other, seed)
        assert all(a.equal(b) for a, b in zip(clip.parameters(), twin.parameters(), strict=True))
        clip.set_classes(tiny_tokens(C, seed=8), torch.linspace(1.5, 0.5, C))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoint_around_the_step(reentrant):
    images, labels = tiny_batch(2, C)
    images.requires_grad_(reentrant)  # without, a reentrant checkpoint has no gradient
    clip, every = (sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=(0, 1), keep_ratio=k) for k in (0.5, 1.0))
    with pytest.raises(RuntimeError, match='Use memory="min"'):
        checkpoint(lambda x: clip(x, labels).loss, images, use_reentrant=reentrant).backward()
    checkpoint(lambda x: every(x, labels).loss, images, use_reentrant=reentrant).backward()
    assert every.model.text_projection.grad is not None


# ---- prediction ------------------------------------------------------------------------------------------------------


def test_predict_equals_model_logits():
    model, tokens, (images, _) = tiny_clip(), tiny_tokens(9), tiny_batch(5, 9)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1)
    own = model.get_logits(images, tokens)[0]
    torch.testing.assert_close(clip.predict(images), own.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(clip.predict(clip.encode_lower(images)), own.detach(), rtol=1e-10, atol=1e-10)
    cached = clip.texts.kept_embeddings
    assert cached() is cached(), "computed once while the weights are the same"
    clip.class_embeddings().zero_()
    torch.testing.assert_close(clip.predict(images), own.detach(), rtol=1e-10, atol=1e-10)
    model.transformer.resblocks[2].mlp.c_fc.weight.data[0, 0] += 0.5  # bypasses the version counter
    moved = model.get_logits(images, tokens)[0]
    assert not torch.allclose(moved, own)
    torch.testing.assert_close(clip.predict(images), moved.detach(), rtol=1e-10, atol=1e-10)


def test_predict_under_inference_mode_then_train():
    clip, (images, labels) = make_clip(), tiny_batch(2, C)
    clip.model.transformer.resblocks[0].ln_1.bias.data += 1.0  # so that features at the cut are computed again
    with torch.inference_mode():
        clip.predict(images)
    clip(images, labels).loss.backward()


def test_top_k_equals_predict():
    clip = make_clip()
    for x in (IMAGES, clip.encode_lower(IMAGES)):
        (logits, class_ids), expected = clip.top_k(x, 4), clip.predict(x).topk(4)
        torch.testing.assert_close(logits, expected.values)
        assert class_ids.equal(expected.indices)


# ---- split step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("labels", [LABELS, mixup(LABELS)], ids=["ids", "soft"])
@pytest.mark.parametrize("inputs", ["images", "features"])
def test_split_step_equals_forward(inputs, labels, mode):
    clips = [make_clip(label_smoothing=0.1).train(mode == "train") for _ in range(2)]
    x = IMAGES if inputs == "images" else clips[0].encode_lower(IMAGES)
    with torch.set_grad_enabled(mode != "no_grad"):
        for _ in range(3):  # with a draw each
            whole, split = clips[0](x, labels).loss, clips[1].loss(clips[1].encode_image(x), labels)
            assert whole.equal(split)
            if mode != "no_grad":
                assert_same_bits(testing.gradients(clips[0], whole), testing.gradients(clips[1], split))
    assert clips[0].get_extra_state().equal(clips[1].get_extra_state())


# ---- names that trainers use -----------------------------------------------------------------------------------------


def test_forward_batch_by_name():
    images, labels = tiny_batch(2, C)
    assert make_clip()(pixel_values=images, labels=labels).loss.equal(make_clip()(images, labels).loss)


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "set_grad_checkpointing"])
def test_gradient_checkpointing_is_memory_min(name):
    clip = make_clip()
    getattr(clip, name)()
    for _ in range(2):
        assert clip.images.tower.cut.memory == clip.texts.tower.cut.memory == "min"
        clip.refresh()
    clip.gradient_checkpointing_disable()
    assert clip.images.tower.cut.memory == "auto"
