"""The training steps that are measured, each held against another computation of the same before it may be."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import skipkernels as sk
from skipkernels.selection import RankSampler
from tests.tolerances import relative_error

from .inputs import Inputs, autocast, parser
from .published import PublishedStep

# Error of a gradient against the published step in fp32, relative to the gradient's norm. Ours may be as wrong as the
# published step in the same precision, and this much more: another order of summation through six blocks in fp32; in
# bf16, where each product is rounded to 8 bits, another draw of the same rounding.
_SLACK = {"fp32": 1e-3, "bf16": 0.05}
# The loss of full fine-tuning against the cross-entropy of the model's own logits: the same operations in the same
# order, but for a logit bias, which no softmax sees.
_FULL_LOSS = 1e-5


class Step(NamedTuple):
    """Forward and backward of a batch, as often as it is called.

    Attributes:
        name: Who computes it.
        K: Classes that take part.
        skip_layers: Blocks skipped in each tower.
        precision: "fp32" or "bf16".
        model: Where the gradients arrive.
        loss: The forward.
    """

    name: str
    K: int
    skip_layers: int
    precision: str
    model: Any
    loss: Callable[[], Tensor]

    def __call__(self) -> None:
        self.model.zero_grad()
        self.loss().backward()


def step_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a SkipCLIP step."""
    options = parser(description, batch=4, classes=50, **defaults)
    options.add_argument("--memory", choices=("fast", "min"), default="fast", help="what blocks keep for backward")
    return options


def agreeing_steps(
    inputs: Inputs, skip_layers: int, memory: str, precision: str, published_precision: str
) -> tuple[Step, Step]:
    """SkipCLIP's step and the published one, both from features at the cut.

    They have to choose the same classes in fp32: rounded to bf16, scores that are close change places. Over the classes
    that SkipCLIP chooses in `precision`, its gradients may be no further from fp32 than the published step's, run in
    that precision as well: `published_precision` is only what the step given back computes in.

    Raises:
        SystemExit: If they do not agree.
    """
    model, tokens, images, labels = inputs
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip_layers, memory=memory)
    their_model = copy.deepcopy(model)  # in which the same parameters train
    published = PublishedStep(their_model, tokens, skip_layers, RankSampler())
    features, their_features = clip.encode_lower(images), published.image_features(images)

    def ours() -> sk.SkipOutput:
        with autocast(images.device, precision):
            return clip(features, labels)

    def theirs(precision: str, class_ids: Tensor | None = None) -> Tensor:
        with autocast(images.device, precision):
            return published(their_features, labels, class_ids)[0]

    with torch.no_grad():
        if not clip(features, labels).class_ids.equal(published(their_features, labels)[1]):
            raise SystemExit("the two steps choose other classes: no timing")
    out = ours()
    in_ours = _gradients(out.loss, model)
    in_theirs, truth = (_gradients(theirs(p, out.class_ids), their_model) for p in (precision, "fp32"))
    if in_ours.keys() != truth.keys():
        raise SystemExit("the two steps train other parameters: no timing")
    errors = {name: tuple(relative_error(found[name], truth[name]) for found in (in_ours, in_theirs)) for name in truth}
    name, (ours_off, theirs_off) = max(errors.items(), key=lambda item: item[1][0] - item[1][1])
    print(
        f"worst gradient in {precision}, of {name}: off by {ours_off:.1e} of its norm from fp32, the published step "
        f"by {theirs_off:.1e}"
    )
    if not ours_off <= theirs_off + _SLACK[precision]:
        raise SystemExit("the two steps do not agree: no timing")

    # The tail is drawn anew in each step, but K stays what it is.
    who, K = "skipkernels" if memory == "fast" else f"skipkernels, memory={memory}", len(out.class_ids)
    return (
        Step(who, K, skip_layers, precision, model, lambda: ours().loss),
        Step("published", K, skip_layers, published_precision, their_model, lambda: theirs(published_precision)),
    )


def full_step(model: Any, tokens: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, int]]:
    """The step of full fine-tuning, as one would write it: (images, labels) → (loss, classes compared)."""

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(tokens, normalize=True)
        return F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels), len(tokens)

    return step


def full_fine_tuning(inputs: Inputs, precision: str) -> Step:
    """Full fine-tuning: every layer trains, on images, over all tokens of all classes.

    Raises:
        SystemExit: If its loss is not the cross-entropy of the model's own logits.
    """
    model, tokens, images, labels = inputs
    model = copy.deepcopy(model).requires_grad_(True)
    model.logit_scale.requires_grad_(False)
    step = full_step(model, tokens)

    def loss() -> Tensor:
        with autocast(images.device, precision):
            return step(images, labels)[0]

    with torch.no_grad():
        with autocast(images.device, precision):
            expected = F.cross_entropy(model.get_logits(images, tokens)[0], labels).item()
        found = loss().item()
    print(f"loss of full fine-tuning {found:.6f}, of the model's own logits {expected:.6f}")
    if not (math.isfinite(found) and math.isclose(found, expected, rel_tol=_FULL_LOSS)):
        raise SystemExit("full fine-tuning has another loss: no timing")
    return Step("full", len(tokens), 0, precision, model, loss)


def _gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
