"""Classes of SkipCLIP: weights and smoothing in the loss, replacement, several templates."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import tiny_batch, tiny_clip, tiny_tokens
from torch import Tensor, nn

import skipkernels as sk
from skipkernels.towers.fused.forward import SAVED_WIDTHS

C = 13
LOSS_TOLERANCE = {"rel": 1e-11}  # two orders of summation in fp64


def class_weights(classes: int = C) -> Tensor:
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
    assert out.loss.item() == pytest.approx(loss.item(), **LOSS_TOLERANCE)
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == trained.keys()
    for name, gradient in trained.items():
        assert (got[name] - gradient).norm() <= 1e-9 * gradient.norm() + 1e-12, name
    model.zero_grad()


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_loss_options_equal_cross_entropy(keep_ratio):
    tokens, (images, labels) = tiny_tokens(C), tiny_batch(5, C)
    options = {"label_smoothing": 0.2, "class_weight": class_weights()}
    clip = sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1, keep_ratio=keep_ratio, **options)
    theirs = {"label_smoothing": 0.2, "weight": class_weights()}
    assert_step_equals_naive(clip, tokens, images, labels, **theirs)
    expected = nn.functional.cross_entropy(clip.predict(images), labels, class_weights().double(), label_smoothing=0.2)
    with torch.no_grad():
        assert clip.eval()(images, labels).loss.item() == pytest.approx(expected.item(), **LOSS_TOLERANCE)


def test_class_weight_is_a_copy_that_moves():
    given = class_weights()
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1, class_weight=given)
    given.zero_()
    assert clip.bfloat16().class_weight.equal(class_weights()) and "class_weight" not in clip.state_dict()
    assert copy.deepcopy(clip).class_weight.equal(class_weights())
    with torch.autocast("cpu", torch.bfloat16):
        assert clip(*tiny_batch(3, C, torch.bfloat16)).loss.isfinite()
    assert clip.to("meta").class_weight.device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing must be a number in \[0, 1\]; got 1.5"),
        (
            {"class_weight": [1.0] * C},
            r"class_weight must be a floating-point tensor \[C=13\], one per class; got list",
        ),
        ({"class_weight": class_weights(C + 1)}, r"got torch.float32 \[14\]"),
        ({"class_weight": -class_weights()}, "not negative; got -.* for class 1"),
        ({"class_weight": class_weights().requires_grad_()}, "class_weight is a constant"),
    ],
)
def test_bad_loss_options(options, message):
    with pytest.raises(ValueError, match=f"SkipCLIP: .*{message}"):
        sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, **options)


# ---- replacement -----------------------------------------------------------------------------------------------------


def tuned(**options) -> tuple[sk.SkipCLIP, torch.optim.Optimizer]:
    """SkipCLIP after one step that changes the weights, and its optimizer."""
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), **{"skip_layers": 1, "keep_ratio": 0.4, **options})
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1), momentum=0.9)
    clip(*tiny_batch(3, C)).loss.backward()
    optimizer.step()
    return clip, optimizer


@pytest.mark.parametrize(("classes", "tail"), [(C, "fixed"), (30, "resample")])
def test_set_classes_equals_fresh_skipclip(classes, tail):
    clip, optimizer = tuned(class_weight=class_weights(), tail=tail)
    clip.model.ln_final.bias.requires_grad_(False)
    clip.gradient_checkpointing_enable()
    before = [(p, p.detach().clone(), p.requires_grad) for p in clip.parameters()]
    momentum = copy.deepcopy(optimizer.state_dict())
    tokens, old_state = tiny_tokens(classes, seed=4), clip.get_extra_state()

    clip.set_classes(tokens, class_weights(classes))
    for p, (same, value, requires_grad) in zip(clip.parameters(), before, strict=True):
        assert p is same and p.equal(value) and p.requires_grad == requires_grad
    torch.testing.assert_close(optimizer.state_dict()["state"], momentum["state"], rtol=0, atol=0)
    assert clip.texts.tower.memory == "min"
    with pytest.raises(ValueError, match="other prompts"):
        clip.set_extra_state(old_state)

    model = copy.deepcopy(clip.model).requires_grad_(True)
    fresh = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=0.4, tail=tail)
    assert fresh.prototypes.equal(clip.prototypes) and clip.class_weight.equal(class_weights(classes).double())
    x, labels = tiny_batch(3, classes)
    assert fresh.predict(x).equal(clip.predict(x))
    fresh.sampler = copy.deepcopy(clip.sampler)
    for _ in range(3):
        assert fresh(x, labels).class_ids.equal(clip(x, labels).class_ids)
    assert_step_equals_naive(clip, tokens, x, labels, weight=class_weights(classes))
    clip.set_classes(tokens)
    assert clip.class_weight is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((tiny_tokens(5)[:, :20],), r"must be \[C, L=77\]"),
        ((tiny_tokens(5) + 1,), "ids in"),
        ((tiny_tokens(5), class_weights(6)), r"class_weight must be .*\[C=5\]"),
    ],
    ids=["length", "vocabulary", "weight"],
)
def test_set_classes_refused_keeps_the_classes(arguments, message):
    clip, _ = tuned()
    x, expected = tiny_batch(3, C)[0], copy.deepcopy(clip)
    with pytest.raises(ValueError, match=message):
        clip.set_classes(*arguments)
    assert clip.predict(x).equal(expected.predict(x)) and clip.get_extra_state().equal(expected.get_extra_state())


def test_set_classes_with_text_cache_is_an_error(tmp_path):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(C), skip_layers=1, text_cache=tmp_path)
    with pytest.raises(RuntimeError, match="set_classes cannot replace the classes of a text_cache"):
        clip.set_classes(tiny_tokens(5))


# ---- templates -------------------------------------------------------------------------------------------------------


def three_templates(classes: int) -> Tensor:
    """Prompts [C, T=3, L]; those of the three templates begin with 3, 2 and 0 shared tokens."""
    first, second, third = (tiny_tokens(classes, seed=seed) for seed in range(3))
    first = torch.cat([first[:, :1], torch.full((classes, 1), 9), first[:, 1:-1]], dim=1)
    third[:, 0] = torch.arange(classes) + 1
    return torch.stack([first, second, third], dim=1)


@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("keep_ratio", [0.4, 1.0])
def test_templates_equal_naive_step(keep_ratio, skip):
    tokens, (x, labels) = three_templates(C), tiny_batch(4, C)
    model = tiny_clip()
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=keep_ratio)
    assert [prompts.prefix_length for prompts in clip.texts.templates] == [3, 2, 0]
    assert clip.reductions["text.shared_prefix"].reason == "the prompts begin with different tokens"
    texts = nn.functional.normalize(torch.stack([model.encode_text(t, True) for t in tokens.unbind(1)]).mean(0), dim=-1)
    torch.testing.assert_close(clip.prototypes, texts.detach(), rtol=0, atol=1e-12)
    image = nn.functional.normalize(model.encode_image(x), dim=-1)
    expected = (model.logit_scale.exp() * image @ texts.T).detach()
    torch.testing.assert_close(clip.predict(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(clip.eval()(x, labels).logits.detach(), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(clip.classifier()(x).detach(), expected, rtol=1e-10, atol=1e-10)
    assert_step_equals_naive(clip.train(), tokens, x, labels)


def test_templates_follow_changes_and_copies():
    tokens, (x, labels) = three_templates(C), tiny_batch(4, C)
    clip = sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1, keep_ratio=1.0)
    twin = pickle.loads(pickle.dumps(clip))
    assert twin(x, labels).loss.equal(clip(x, labels).loss)
    with torch.no_grad():
        for part in (clip, twin):
            part.model.transformer.resblocks[0].mlp.c_fc.weight.mul_(1.1)
    assert_step_equals_naive(clip, tokens, x, labels)
    twin.refresh()
    twin.gradient_checkpointing_enable()
    assert_step_equals_naive(twin, tokens, x, labels)
    state = twin.get_extra_state()
    clip.set_extra_state(state)
    with pytest.raises(ValueError, match="other prompts"):
        sk.SkipCLIP(tiny_clip(), tokens.flip(1), skip_layers=1).set_extra_state(state)
    clip.set_classes(tokens[:5, :2])
    assert_step_equals_naive(clip, tokens[:5, :2], x, labels % 5)
    clip.set_classes(tokens[:, 1:2])
    assert clip.encoders.tokens.equal(tokens[:, 1].int())
    clip.to("meta")
    held = [x for prompts in clip.texts.templates for x in prompts.tensors().values()]
    assert {x.device.type for x in (*held, clip.prototypes)} == {"meta"}


def test_one_template_is_the_ordinary_step():
    tokens, batch = tiny_tokens(C), tiny_batch(4, C)
    clips = [sk.SkipCLIP(tiny_clip(), x, skip_layers=1) for x in (tokens, tokens[:, None])]
    for clip in clips:
        clip(*batch).loss.backward()
    for ours, theirs in zip(*(clip.parameters() for clip in clips), strict=True):
        assert (ours.grad is None and theirs.grad is None) or ours.grad.equal(theirs.grad)
    assert clips[0].get_extra_state().equal(clips[1].get_extra_state())


def test_templates_share_the_free_memory(monkeypatch):
    """A step runs the text tower three times: `memory="auto"` counts what they save together."""
    clip = sk.SkipCLIP(tiny_clip(), three_templates(C), skip_layers=1)
    clip(*tiny_batch(3, C))
    text = clip.texts.tower
    rows = torch.zeros(20, 16, dtype=torch.float64)
    saved = rows.numel() * rows.element_size() * SAVED_WIDTHS * 2  # two blocks
    monkeypatch.setattr("skipkernels.memory.free_bytes", lambda device: 2 * saved + 2)
    assert [text.block_memory(rows, runs) for runs in (3, 1)] == ["min", "fast"]


def test_templates_in_a_text_cache(tmp_path):
    def step(folder, seed=0):
        torch.manual_seed(0)
        clip = sk.SkipCLIP(tiny_clip(torch.float32, seed=seed), three_templates(C), skip_layers=1, text_cache=folder)
        out = clip(*tiny_batch(4, C, torch.float32))
        out.loss.backward()
        return [out.loss, clip.prototypes, clip.predict(tiny_batch(4, C, torch.float32)[0])]

    expected = step(None)
    for _ in ("created", "opened"):
        assert all(a.equal(b) for a, b in zip(step(tmp_path), expected, strict=True))
    assert {path.name for path in tmp_path.iterdir()} == {"features", "prototypes"}
    with pytest.raises(sk.CacheError, match="differs in embedding|differs in lower blocks"):
        step(tmp_path, seed=1)


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"class_weight": class_weights()}], ids=["smoothing", "weight"]
)
def test_other_losses_refuse_options_of_the_cross_entropy(options):
    clip, (images, _) = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1, **options), tiny_batch(2, C)
    [name] = options
    with pytest.raises(ValueError, match=f"^pair_loss: {name} of SkipCLIP is an option of the cross-entropy"):
        sk.pairs.pair_loss(clip, images, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=f"^sigmoid_loss: {name} of SkipCLIP is an option"):
        sk.pairs.sigmoid_loss(clip, images, torch.zeros(2, C), max_labels=1)
