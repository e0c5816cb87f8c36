"""Evaluation, state dicts, copies, and the interfaces that trainers use."""

from __future__ import annotations

import copy
import pickle

import pytest
import safetensors.torch
import torch
from models import tiny_batch, tiny_clip, tiny_tokens
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import skipkernels as sk
from skipkernels.app import heads
from skipkernels.clip.state import Origin, pack_state

C = 40


def make_clip(seed: int = 0, dtype: torch.dtype = torch.float64, **arguments) -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(dtype, seed=seed), tiny_tokens(C), skip_layers=1, keep_ratio=0.25, **arguments)


def drawn(clip: sk.SkipCLIP, steps: int = 3) -> list[list[int]]:
    images, labels = tiny_batch(2, C)
    return [clip(images, labels).class_ids.tolist() for _ in range(steps)]


# ---- evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
def test_evaluation_compares_every_class_without_draw(gradients):
    clip, other, (images, labels) = make_clip(), make_clip(), tiny_batch(20, C)
    first = drawn(clip)
    clip.eval()
    with torch.set_grad_enabled(gradients):
        out = clip(images, labels)
    expected = torch.nn.functional.cross_entropy(clip.predict(images), labels)
    assert out.logits.shape == (20, C) and out.class_ids.tolist() == list(range(C)) and out.targets.equal(labels)
    torch.testing.assert_close(out.logits.detach(), clip.predict(images), rtol=1e-10, atol=1e-10)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-10)
    clip.train()
    assert first + drawn(clip) == drawn(other, 6), "the larger batch of the evaluation changed the draws"


def test_evaluation_gradients_of_all_classes():
    clip, full = make_clip(), sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, keep_ratio=1.0)
    images, labels = tiny_batch(3, C)
    for each in (clip.eval(), full):
        each(images, labels).loss.backward()
    for (name, got), expected in zip(clip.named_parameters(), full.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_predict_under_inference_mode_then_train():
    clip, (images, labels) = make_clip(), tiny_batch(2, C)
    clip.model.transformer.resblocks[0].ln_1.bias.data += 1.0  # so that features at the cut are computed again
    with torch.inference_mode():
        clip.predict(images)
    clip(images, labels).loss.backward()


# ---- state -----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(3, dtype=torch.float16), "must be the uint8 tensor .* got torch.float16 .* To average"),
        ({"generator": 1}, "must be the uint8 tensor .* got dict"),
        (torch.zeros(9, dtype=torch.uint8), "is damaged"),
        (lambda: make_clip().get_extra_state().roll(1), "is damaged"),
        (
            lambda: sk.SkipCLIP(tiny_clip(), tiny_tokens(C).flip(0), skip_layers=1).get_extra_state(),
            "is of other prompts; .* with the same prompts in this order",
        ),
        (lambda: pack_state(make_clip()._origin()._replace(processes=4), torch.zeros(1), {}), "of other processes; "),
        (lambda: pack_state(Origin("", 7, 1), torch.zeros(1), {}), "is of other prompts and width; "),
    ],
    ids=["floats", "dictionary", "short", "damaged", "other_order", "other_processes", "other_model"],
)
def test_set_extra_state_refuses_what_is_not_its_own(state, message):
    clip = make_clip()
    before = clip.get_extra_state()
    with pytest.raises(ValueError, match=message):
        clip.set_extra_state(state() if callable(state) else state)
    assert clip.get_extra_state().equal(before)


# ---- interfaces of trainers ----------------------------------------------------------------------------------------


def test_forward_batch_by_name():
    images, labels = tiny_batch(2, C)
    assert make_clip()(pixel_values=images, labels=labels).loss.equal(make_clip()(images, labels).loss)


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "set_grad_checkpointing"])
def test_gradient_checkpointing_is_memory_min(name):
    clip = make_clip()
    getattr(clip, name)()
    assert clip.images.tower.memory == clip.texts.tower.memory == "min"
    clip.gradient_checkpointing_disable()
    assert clip.images.tower.memory == "auto"


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoint_around_the_step(reentrant):
    images, labels = tiny_batch(2, C)
    images.requires_grad_(reentrant)  # without, a reentrant checkpoint has no gradient
    clip, every = (sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=(0, 1), keep_ratio=k) for k in (0.5, 1.0))
    with pytest.raises(RuntimeError, match='Use memory="min"'):
        checkpoint(lambda x: clip(x, labels).loss, images, use_reentrant=reentrant).backward()
    checkpoint(lambda x: every(x, labels).loss, images, use_reentrant=reentrant).backward()
    assert every.model.text_projection.grad is not None


def test_bfloat16_keeps_prototypes_in_fp32():
    clip, (images, labels) = make_clip(dtype=torch.float32), tiny_batch(2, C, torch.float32)
    prototypes = clip.prototypes.clone()
    clip.bfloat16()
    assert clip.prototypes.equal(prototypes)
    assert clip(clip.encode_lower(images), labels).loss.isfinite()


def test_classifier_exports():
    clip, (images, _) = make_clip(dtype=torch.float32), tiny_batch(3, C, torch.float32)
    classifier = clip.classifier()
    torch.testing.assert_close(classifier(images).detach(), clip.predict(images))
    exported = torch.export.export(classifier, (images,)).module()
    torch.testing.assert_close(exported(images), clip.predict(images), rtol=1e-4, atol=1e-4)


def test_classifier_with_a_head_exports():
    clip, (images, _) = make_clip(dtype=torch.float32), tiny_batch(3, C, torch.float32)
    image = clip.encode_image(images).detach()
    head = heads.gaussian_head(image, torch.tensor([0, 2, 2]), classes=3)
    exported = torch.export.export(clip.classifier(head), (images,)).module()
    torch.testing.assert_close(exported(images), head.logits(image), rtol=1e-4, atol=1e-4)


def test_classifier_has_its_own_mode():
    clip = make_clip()
    classifier = clip.classifier()
    assert all(module.training for module in clip.modules())
    clip.train()
    assert not any(module.training for module in classifier.modules())
    assert classifier.encoder.conv1.weight is clip.model.visual.conv1.weight


def test_repr_begins_with_the_task():
    clip = make_clip()
    trainable = sum(p.numel() for p in clip.trainable_parameters())
    expected = f"classes={C}, skip_layers=(1, 1), trainable={trainable:,}, dtype=torch.float64, device=cpu"
    assert repr(clip).splitlines()[:3] == ["SkipCLIP(", f"  {expected}", "  (model): CLIP("]


# ---- trainers around the step --------------------------------------------------------------------------------------


def step_of(clip: sk.SkipCLIP, optimizer: torch.optim.Optimizer, seed: int) -> None:
    clip(*tiny_batch(3, C, seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_average_of_buffers_is_refused():
    clip = make_clip(dtype=torch.float32)
    average = AveragedModel(clip, use_buffers=True)
    for _ in range(2):
        average.update_parameters(clip)
    with pytest.raises(RuntimeError, match=r"altered .*: the attention mask .*average with use_buffers=False"):
        average.module.eval()


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


def test_gradient_accumulation_equals_the_large_batch():
    images, labels = tiny_batch(6, C)
    large, small = (sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, keep_ratio=1.0) for _ in range(2))
    large(images, labels).loss.backward()
    for part in range(3):
        (small(images[part::3], labels[part::3]).loss / 3).backward()
    for (name, expected), got in zip(large.named_parameters(), small.parameters(), strict=True):
        if expected.grad is not None:
            assert (got.grad - expected.grad).norm() <= 1e-9 * expected.grad.norm() + 1e-12, name


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
