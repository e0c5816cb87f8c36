"""SkipCLIP(train_text=False): constant class embeddings, all classes, the image tower alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import tiny_batch, tiny_clip, tiny_tokens

import skipkernels as sk
from skipkernels.testing import relative_error, saved_bytes

C, B = 11, 4


def image_only(model: torch.nn.Module, **options) -> sk.SkipCLIP:
    return sk.SkipCLIP(model, tiny_tokens(C), **{"skip_layers": 1, "train_text": False} | options)


def test_step_equals_constant_texts_in_the_model():
    model = tiny_clip(torch.float64)
    plain = copy.deepcopy(model)
    clip, (images, labels) = image_only(model, label_smoothing=0.1), tiny_batch(B, C, torch.float64)
    out = clip(images, labels, return_logits=True)
    out.loss.backward()
    with torch.no_grad():
        text = F.normalize(plain.encode_text(tiny_tokens(C)), dim=-1)
    logits = plain.logit_scale.exp() * F.normalize(plain.encode_image(images), dim=-1) @ text.T
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    loss.backward()
    assert out.class_ids.tolist() == list(range(C)) and out.targets.equal(labels)
    assert relative_error(out.logits, logits) < 1e-12 and out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    trained = {id(p) for p in clip.trainable_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained) == parameter.requires_grad, name
        if parameter.grad is not None:
            assert name.startswith("visual.") and relative_error(parameter.grad, plain.get_parameter(name).grad) < 1e-9
    assert trained


def test_training_leaves_the_texts_and_their_embeddings():
    model = tiny_clip()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("visual.")}
    clip, (images, labels) = image_only(model), tiny_batch(B, C)
    step = sk.graphed(clip, torch.optim.SGD(clip.parameter_groups(text_lr=1.0, image_lr=1.0)), batch_size=B)
    losses = [step(images, labels).loss.item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert all(model.get_parameter(name).equal(value) for name, value in before.items())
    clip.eval()
    assert clip.class_embeddings().equal(clip.prototypes)
    with torch.no_grad():
        expected = model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=-1) @ clip.prototypes.T
    torch.testing.assert_close(clip.predict(images), expected)
    torch.testing.assert_close(clip(images, labels).logits, expected)


def test_nothing_of_the_texts_is_kept_or_saved():
    images, labels = tiny_batch(B, C)
    whole, alone = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, keep_ratio=1.0), image_only(tiny_clip())
    assert alone.texts._table is None
    assert saved_bytes(lambda: alone(images, labels).loss) < saved_bytes(lambda: whole(images, labels).loss)
    alone(images, labels)
    alone.set_classes(tiny_tokens(C + 3, seed=5))
    assert alone.texts._table is None


def test_classes_are_replaced_and_saved():
    clip, (images, labels) = image_only(tiny_clip()), tiny_batch(B, C)
    other = sk.SkipCLIP(copy.deepcopy(clip.model), tiny_tokens(C + 3, seed=5), skip_layers=1, train_text=False)
    clip.set_classes(tiny_tokens(C + 3, seed=5))
    torch.testing.assert_close(clip(images, labels).loss, other(images, labels).loss)
    fresh = sk.SkipCLIP(tiny_clip(seed=3), tiny_tokens(C + 3, seed=5), skip_layers=1, train_text=False)
    fresh.load_state_dict(clip.state_dict())
    assert fresh(images, labels).loss.equal(clip(images, labels).loss)


def test_labels_of_several_classes():
    model = tiny_clip(torch.float64)
    clip, (images, _) = image_only(model), tiny_batch(B, C, torch.float64)
    labels = torch.zeros(B, C, dtype=torch.int64)
    labels[:, 2] = labels[0, 5] = 1
    out = sk.pairs.sigmoid_loss(clip, images, labels, max_labels=2)
    logits = model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=-1) @ clip.prototypes.T
    expected = F.binary_cross_entropy_with_logits(logits, labels.double())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_text_parameters_that_require_gradients_are_refused():
    clip, (images, labels) = image_only(tiny_clip()), tiny_batch(B, C)
    clip.model.text_projection.requires_grad_(True)
    with pytest.raises(RuntimeError, match="requires_grad was set on parameters below the cut"):
        clip.eval()
    clip.refresh()
    assert not clip.model.text_projection.requires_grad and clip.train()(images, labels).loss.isfinite()
