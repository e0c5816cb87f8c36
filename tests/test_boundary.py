"""run_frozen saves nothing for backward, passes no gradient and bounds memory.

A step in which the cut would drop a gradient raises an error.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import skipkernels as sk
from skipkernels import run_frozen
from tests.hugging_face_models import hugging_face_clip
from tests.models import tiny_batch, tiny_clip, tiny_tokens

C = 7
LOST = "no gradient passes the cut, and .*skip_layers=0"


class Lower(nn.Module):
    """Layers below a cut, and the sizes of the batches that they were called with."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).requires_grad_(False)
        self.batches: list[int] = []

    def forward(self, inputs):
        self.batches.append(len(inputs))
        return self.layers(inputs)


@pytest.mark.parametrize(
    ("batch", "chunk", "batches"),
    [(1, [3], [1]), (3, [3], [3]), (8, [3], [3, 3, 2]), (300, [], [256, 44])],
    ids=["one", "a chunk", "chunks", "default"],
)
def test_boundary_runs_full_chunks_without_gradient(batch, chunk, batches):
    lower, inputs = Lower().double(), torch.randn(batch, 8, dtype=torch.float64)
    hidden = run_frozen(lower, inputs, *chunk)
    assert lower.batches == batches and not hidden.requires_grad
    torch.testing.assert_close(hidden, lower(inputs))


@pytest.mark.parametrize(("trains", "named"), [("inputs", "its input"), ("lower", "a tensor used below it")])
def test_boundary_refuses_to_lose_a_gradient(trains, named):
    lower, inputs = Lower().requires_grad_(trains == "lower"), torch.randn(5, 8, requires_grad=trains == "inputs")
    with pytest.raises(RuntimeError, match=f"no gradient passes the cut, and {named} requires grad"):
        run_frozen(lower, inputs, 2)


# ---- gradients that the cut would drop ---------------------------------------------------------------------------


class Prompted(nn.Module):
    """A CLIP with learned inputs: a visual prompt, a layer before the image tower, a context that a hook adds."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.prompt = nn.Parameter(0.1 * torch.randn(3, 16, 16, generator=generator, dtype=torch.float64))
        self.layer = nn.Conv2d(3, 3, 1, dtype=torch.float64)
        self.context = nn.Parameter(0.1 * torch.randn(2, 16, generator=generator, dtype=torch.float64))

    def images(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images + self.prompt)

    def add_context(self) -> None:
        def hook(module: nn.Module, inputs: tuple, hidden: torch.Tensor) -> torch.Tensor:
            return torch.cat([hidden[:, :2] + self.context, hidden[:, 2:]], dim=1)

        self.model.token_embedding.register_forward_hook(hook)

    def learned(self) -> list[nn.Parameter]:
        return [self.prompt, *self.layer.parameters(), self.context]

    def reference_logits(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        image, text = self.model.encode_image(images), self.model.encode_text(tokens)
        image, text = (nn.functional.normalize(x, dim=-1) for x in (image, text))
        return self.model.logit_scale.exp() * image @ text.T

    def reference_loss(self, images: torch.Tensor, labels: torch.Tensor, *, pairs: bool = False) -> torch.Tensor:
        tokens = tiny_tokens(C)[labels] if pairs else tiny_tokens(C)
        logits = self.reference_logits(self.images(images), tokens)
        if not pairs:
            return nn.functional.cross_entropy(logits, labels)
        own = torch.arange(len(images))
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2


@pytest.mark.parametrize("use", ["training", "evaluation", "pair_loss"])
def test_gradients_of_inputs_equal_eager_without_a_cut(use):
    prompted, (images, labels) = Prompted(tiny_clip()), tiny_batch(3, C)
    prompted.add_context()
    clip = sk.SkipCLIP(prompted.model, tiny_tokens(C), skip_layers=0, keep_ratio=1.0).train(use != "evaluation")
    prompted.reference_loss(images, labels, pairs=use == "pair_loss").backward()
    expected = [parameter.grad for parameter in prompted.learned()]
    prompted.zero_grad()
    inputs = prompted.images(images)
    (sk.pairs.pair_loss(clip, inputs, labels) if use == "pair_loss" else clip(inputs, labels).loss).backward()
    for parameter, gradient in zip(prompted.learned(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)
        assert gradient.any()


@pytest.mark.parametrize("call", ["training", "evaluation", "encode_lower", "encode_image", "pair_loss"])
def test_lost_gradient_of_images_is_an_error(call):
    prompted, (images, labels) = Prompted(tiny_clip()), tiny_batch(3, C)
    clip = sk.SkipCLIP(prompted.model, tiny_tokens(C), skip_layers=1).train(call != "evaluation")
    calls = {
        "encode_lower": clip.encode_lower,
        "encode_image": clip.encode_image,
        "pair_loss": lambda x: sk.pairs.pair_loss(clip, x, labels),
    }
    run = calls.get(call, lambda x: clip(x, labels))
    for x in (images + prompted.prompt, prompted.layer(images), images.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=LOST):
            run(x)
        with torch.no_grad():
            run(x)
        run(x.detach())


def test_lost_gradient_of_a_context_is_an_error():
    prompted, (images, labels) = Prompted(tiny_clip()), tiny_batch(3, C)
    clip = sk.SkipCLIP(prompted.model, tiny_tokens(C), skip_layers=1)
    clip(images, labels)
    prompted.add_context()
    clip.eval().train()  # a mode switch compares hooks
    for call in (lambda: clip(images, labels), lambda: sk.pairs.pair_loss(clip, images, tiny_tokens(C)[labels])):
        with pytest.raises(RuntimeError, match=LOST):
            call()
    with pytest.raises(RuntimeError, match=LOST):
        sk.SkipCLIP(prompted.model, tiny_tokens(C), skip_layers=1)
    prompted.context.requires_grad_(False)
    assert clip(images, labels).loss.isfinite()


def test_lost_gradient_of_checkpointing_names_its_remedy():
    """`gradient_checkpointing_enable()` of transformers calls `enable_input_require_grads()`."""
    model, (images, labels) = hugging_face_clip(), tiny_batch(3, C)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match=r"gradient_checkpointing_disable\(\) and disable_input_require_grads\(\)"):
        sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1)
    model.disable_input_require_grads()
    assert sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1)(images, labels).loss.isfinite()
