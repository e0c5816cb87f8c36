"""Evaluation, state dicts, copies, and the calls that trainers make."""

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

C = 40


def a_clip(seed: int = 0, dtype: torch.dtype = torch.float64, **arguments) -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(dtype, seed=seed), tiny_tokens(C), skip_layers=1, keep_ratio=0.25, **arguments)


def drawn(clip: sk.SkipCLIP, steps: int = 3) -> list[list[int]]:
    images, labels = tiny_batch(2, C)
    return [clip(images, labels).class_ids.tolist() for _ in range(steps)]


# ---- evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False])
def test_evaluation_compares_with_every_class_and_changes_no_draw(gradients):
    clip, other, (images, labels) = a_clip(), a_clip(), tiny_batch(20, C)
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


def test_evaluation_has_the_gradients_of_all_classes():
    clip, full = a_clip(), sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, keep_ratio=1.0)
    images, labels = tiny_batch(3, C)
    for each in (clip.eval(), full):
        each(images, labels).loss.backward()
    for (name, got), expected in zip(clip.named_parameters(), full.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_prediction_under_inference_mode_does_not_end_training():
    clip, (images, labels) = a_clip(), tiny_batch(2, C)
    clip.model.transformer.resblocks[0].ln_1.bias.data += 1.0  # so that kept features are computed again
    with torch.inference_mode():
        clip.predict(images)
    clip(images, labels).loss.backward()


# ---- state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", ["resample", "fixed"])
def test_a_state_dict_continues_the_draws_in_another_process(tail):
    clip = a_clip(tail=tail)
    drawn(clip)
    state = safetensors.torch.load(safetensors.torch.save(clip.state_dict()))  # as trainers write it
    fresh = a_clip(seed=5, tail=tail)
    assert not fresh.prototypes.equal(clip.prototypes)
    fresh.load_state_dict(state)
    assert fresh.prototypes.equal(clip.prototypes)
    assert drawn(fresh) == drawn(clip)


def test_the_models_own_keys_stay_and_one_is_added():
    clip = a_clip()
    assert set(clip.state_dict()) == {f"model.{name}" for name in clip.model.state_dict()} | {"_extra_state"}


def test_a_state_dict_without_sampler_loads_with_a_warning():
    clip, old = a_clip(), a_clip().state_dict()
    del old["_extra_state"]
    with pytest.warns(UserWarning, match="no sampler and no prototypes"):
        clip.load_state_dict(old)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(3), "must be the uint8 tensor"),
        ({"generator": 1}, "must be the uint8 tensor"),
        (torch.zeros(9, dtype=torch.uint8), "is damaged"),
        (lambda: sk.SkipCLIP(tiny_clip(), tiny_tokens(5), skip_layers=1).get_extra_state(), r"prototypes \[5, 12\]"),
        (
            lambda: sk.SkipCLIP(tiny_clip(), tiny_tokens(C).flip(0), skip_layers=1).get_extra_state(),
            "of the same in another order",
        ),
    ],
    ids=["floats", "dictionary", "damaged", "other_classes", "other_order"],
)
def test_extra_state_that_does_not_fit_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        a_clip().set_extra_state(state() if callable(state) else state)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda clip: pickle.loads(pickle.dumps(clip))], ids=["copy", "pickle"])
def test_a_copy_draws_and_trains_as_the_original(way):
    clip, (images, labels) = a_clip(), tiny_batch(2, C)
    drawn(clip)
    twin = way(clip)
    assert drawn(twin) == drawn(clip)
    out, expected = twin(images, labels), clip(images, labels)
    assert out.loss.equal(expected.loss)
    out.loss.backward()
    assert clip.model.text_projection.grad is None, "the copy trains its own weights"


# ---- what trainers call ----------------------------------------------------------------------------------------


def test_the_batch_can_be_passed_by_name():
    images, labels = tiny_batch(2, C)
    losses = [a_clip()(**{name: images}, labels=labels).loss for name in ("x", "pixel_values", "images")]
    assert losses[0].equal(losses[1]) and losses[0].equal(losses[2])
    with pytest.raises(TypeError, match="pass images or features as one of x, .*; got none"):
        a_clip()(labels=labels)
    with pytest.raises(TypeError, match="got more than one"):
        a_clip()(images, labels, pixel_values=images)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_are_tensors(training):
    assert all(isinstance(value, torch.Tensor) for value in a_clip().train(training)(*tiny_batch(2, C)))


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "set_grad_checkpointing"])
def test_gradient_checkpointing_is_memory_min(name):
    clip = a_clip()
    getattr(clip, name)()
    assert clip._image.memory == clip._text.memory == "min"
    clip.gradient_checkpointing_disable()
    assert clip._image.memory == "auto"


def test_gradient_checkpointing_takes_the_options_of_transformers():
    clip = a_clip()
    clip.gradient_checkpointing_enable(gradient_checkpointing_kwargs={}, every_n_layers=1, offload=False)
    assert clip._image.memory == "min"


def test_an_average_of_buffers_is_over_the_same_buffers():
    clip = a_clip()
    average = AveragedModel(clip, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    clip.model.transformer.resblocks[0].ln_1.bias.data += 1.0
    clip.eval()  # forgets the text features at the cut
    for _ in range(2):
        average.update_parameters(clip)
    assert average.module.prototypes.equal(clip.prototypes)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_step_is_refused_unless_nothing_is_drawn(reentrant):
    images, labels = tiny_batch(2, C)
    images.requires_grad_()
    clip = a_clip()
    with pytest.raises(RuntimeError, match='Use memory="min"'):
        checkpoint(lambda x: clip(x, labels).loss, images, use_reentrant=reentrant).backward()
    every = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, keep_ratio=1.0)
    checkpoint(lambda x: every(x, labels).loss, images, use_reentrant=reentrant).backward()
    assert every.model.text_projection.grad is not None


def test_everything_moves_with_to():
    clip = a_clip().to("meta")
    held = [clip._text.tokens, clip._text.pooled, clip._text.prompts.lengths, clip.prototypes]
    assert {tensor.device.type for tensor in held} == {"meta"}


def test_half_precision_leaves_the_prototypes_in_fp32():
    clip, (images, labels) = a_clip(dtype=torch.float32), tiny_batch(2, C, torch.float32)
    prototypes = clip.prototypes.clone()
    clip.bfloat16()
    assert clip.prototypes.equal(prototypes)
    assert clip(clip.encode_lower(images), labels).loss.isfinite()


def test_made_under_autocast_the_prototypes_are_those_of_fp32():
    expected = a_clip(dtype=torch.float32).prototypes
    with torch.autocast("cpu", torch.bfloat16):
        clip = a_clip(dtype=torch.float32)
    assert clip.prototypes.equal(expected)


def test_a_classifier_is_exported():
    clip, (images, _) = a_clip(dtype=torch.float32), tiny_batch(3, C, torch.float32)
    classifier = clip.classifier()
    torch.testing.assert_close(classifier(images).detach(), clip.predict(images))
    exported = torch.export.export(classifier, (images,)).module()
    torch.testing.assert_close(exported(images), clip.predict(images), rtol=1e-4, atol=1e-4)


def test_a_classifier_has_a_mode_of_its_own():
    clip = a_clip()
    classifier = clip.classifier()
    assert all(module.training for module in clip.modules())
    clip.train()
    assert not any(module.training for module in classifier.modules())
    assert classifier.encoder.conv1.weight is clip.model.visual.conv1.weight


def test_a_state_without_a_digest_of_the_prompts_is_taken():
    clip, state = a_clip(), a_clip().get_extra_state()
    tensors = safetensors.torch.load(state.numpy().tobytes())
    del tensors["prompts"]
    clip.set_extra_state(torch.frombuffer(bytearray(safetensors.torch.save(tensors)), dtype=torch.uint8))


def test_one_class_has_zero_gradients():
    model, (images, labels) = tiny_clip(), tiny_batch(3, 1)
    sk.SkipCLIP(model, tiny_tokens(1), skip_layers=1)(images, labels).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(gradient.abs().max() < 1e-12 for gradient in gradients)  # rounding of a zero
