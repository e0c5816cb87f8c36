"""Classes of SkipCLIP: weights and smoothing in the loss, replacement, several templates."""

from __future__ import annotations

import copy

import pytest
import torch
from models import tiny_batch, tiny_clip, tiny_tokens
from torch import Tensor, nn

import skipkernels as sk

C = 13
LOSS = {"rel": 1e-11}  # two orders of summation in fp64


def weights(classes: int = C) -> Tensor:
    return torch.linspace(0.0, 2.0, classes)


def naive_loss(model: nn.Module, images: Tensor, tokens: Tensor, labels: Tensor, **options) -> Tensor:
    """Cross-entropy by the model's own encoders over the classes of `tokens` [K, L] or [K, T, L]."""
    image = nn.functional.normalize(model.encode_image(images), dim=-1)
    tokens = tokens if tokens.ndim == 3 else tokens[:, None]
    templates = [nn.functional.normalize(model.encode_text(tokens[:, t]), dim=-1) for t in range(tokens.shape[1])]
    text = nn.functional.normalize(torch.stack(templates).mean(0), dim=-1)
    return nn.functional.cross_entropy(model.logit_scale.exp() * image @ text.T, labels, **options)


def assert_step_equals_naive(clip: sk.SkipCLIP, tokens: Tensor, images: Tensor, labels: Tensor, **options) -> None:
    """Compare loss and gradients of a step with `naive_loss` over the classes that it kept."""
    model = clip.model
    model.zero_grad()
    out = clip(images, labels)
    out.loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if "weight" in options:
        options["weight"] = options["weight"].to(images.dtype)[out.class_ids]
    loss = naive_loss(model, images, tokens[out.class_ids], out.targets, **options)
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), **LOSS)
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == trained.keys()
    for name, gradient in trained.items():
        assert (got[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name
    model.zero_grad()


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_loss_options_equal_cross_entropy(keep_ratio):
    tokens, (images, labels) = tiny_tokens(C), tiny_batch(5, C)
    options = {"label_smoothing": 0.2, "class_weight": weights()}
    clip = sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1, keep_ratio=keep_ratio, **options)
    theirs = {"label_smoothing": 0.2, "weight": weights()}
    assert_step_equals_naive(clip, tokens, images, labels, **theirs)
    expected = nn.functional.cross_entropy(clip.predict(images), labels, weights().double(), label_smoothing=0.2)
    with torch.no_grad():
        assert clip.eval()(images, labels).loss.item() == pytest.approx(expected.item(), **LOSS)


def test_class_weight_is_a_copy_that_moves():
    given = weights()
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1, class_weight=given)
    given.zero_()
    assert clip.bfloat16().class_weight.equal(weights()) and "class_weight" not in clip.state_dict()
    assert copy.deepcopy(clip).class_weight.equal(weights())
    with torch.autocast("cpu", torch.bfloat16):
        assert clip(*tiny_batch(3, C, torch.bfloat16)).loss.isfinite()
    assert clip.to("meta").class_weight.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be a number in \[0, 1\]; got 1.5"),
        ({"label_smoothing": None}, ValueError, "label_smoothing must be a number"),
        ({"class_weight": [1.0] * C}, TypeError, r"class_weight must be a floating-point tensor \[C\]; got list"),
        ({"class_weight": torch.ones(C).long()}, TypeError, "got torch.int64"),
        ({"class_weight": weights(C + 1)}, ValueError, r"must be \[C=13\], one for each class; got \[14\]"),
        ({"class_weight": -weights()}, ValueError, "not negative; got -.* for class 1"),
        ({"class_weight": weights() * torch.nan}, ValueError, "must be finite"),
        ({"class_weight": weights().requires_grad_()}, ValueError, "class_weight is a constant"),
    ],
)
def test_loss_options_out_of_range(options, error, message):
    with pytest.raises(error, match=f"SkipCLIP: .*{message}"):
        sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, **options)


# ---- replacement -----------------------------------------------------------------------------------------------------


def tuned(**options) -> tuple[sk.SkipCLIP, torch.optim.Optimizer]:
    """SkipCLIP after one step that changes the weights, and its optimizer."""
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), **{"skip_layers": 1, "keep_ratio": 0.4, **options})
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1), momentum=0.9)
    clip(*tiny_batch(3, C)).loss.backward()
    optimizer.step()
    return clip, optimizer


@pytest.mark.parametrize("tail", ["resample", "fixed"])
@pytest.mark.parametrize("classes", [C, 30])
def test_set_classes_equals_fresh_skipclip(classes, tail):
    clip, optimizer = tuned(class_weight=weights(), tail=tail)
    clip.model.ln_final.bias.requires_grad_(False)
    clip.gradient_checkpointing_enable()
    before = [(p, p.detach().clone(), p.requires_grad) for p in clip.parameters()]
    momentum = copy.deepcopy(optimizer.state_dict())
    tokens, old_state = tiny_tokens(classes, seed=4), clip.get_extra_state()

    clip.set_classes(tokens, weights(classes))
    for p, (same, value, requires_grad) in zip(clip.parameters(), before, strict=True):
        assert p is same and p.equal(value) and p.requires_grad == requires_grad
    assert str(optimizer.state_dict()) == str(momentum) and clip._text.memory == "min"
    with pytest.raises(ValueError, match="other prompts|this model and task"):
        clip.set_extra_state(old_state)

    model = copy.deepcopy(clip.model).requires_grad_(True)
    fresh = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=0.4, tail=tail)
    assert fresh.prototypes.equal(clip.prototypes) and clip.class_weight.equal(weights(classes).double())
    x, labels = tiny_batch(3, classes)
    assert fresh.predict(x).equal(clip.predict(x))
    fresh.sampler = copy.deepcopy(clip.sampler)
    for _ in range(3):
        assert fresh(x, labels).class_ids.equal(clip(x, labels).class_ids)
    assert_step_equals_naive(clip, tokens, x, labels, weight=weights(classes))
    clip.set_classes(tokens)
    assert clip.class_weight is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((tiny_tokens(5)[:, :20],), ValueError, r"must be \[C, L=77\]"),
        ((tiny_tokens(5) + 1,), ValueError, "ids in"),
        ((tiny_tokens(5), weights(6)), ValueError, r"class_weight must be \[C=5\]"),
    ],
    ids=["length", "vocabulary", "weight"],
)
def test_set_classes_refused_keeps_the_classes(arguments, error, message):
    clip, _ = tuned()
    x, expected = tiny_batch(3, C)[0], copy.deepcopy(clip)
    with pytest.raises(error, match=message):
        clip.set_classes(*arguments)
    assert clip.predict(x).equal(expected.predict(x)) and clip.get_extra_state().equal(expected.get_extra_state())


def test_set_classes_with_text_cache_is_an_error(tmp_path):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1, text_cache=tmp_path)
    with pytest.raises(RuntimeError, match="set_classes cannot replace the classes of a text_cache"):
        clip.set_classes(tiny_tokens(5))
