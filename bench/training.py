"""The training steps that benchmarks measure; each is checked against another computation of the same result."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import skipkernels as sk
from skipkernels.app.data import Task, TestSet
from skipkernels.app.data.images import Images
from skipkernels.app.devices import autocast
from skipkernels.app.methods.coop import CoOp
from skipkernels.selection import RankSampler
from skipkernels.testing import gradients, relative_error

from .inputs import Inputs, class_names
from .published import PublishedStep

# Relative error of a gradient against the published step in fp32. Ours may exceed that of the published step in the
# same precision by this: another order of summation through six blocks in fp32; in bf16 other rounding to 8 bits.
SLACK = {"fp32": 1e-3, "bf16": 0.05}
# Relative difference of the loss of full fine-tuning and prompt tuning from the cross-entropy of the model's own
# logits: the same operations except a logit bias, which softmax ignores, and unit norms; another order if compiled.
_LOSS = {"fp32": 1e-4, "bf16": 0.05}
_CONTEXT = "a photo of a"

Skip = int | tuple[int, int]
"""Blocks skipped in each tower, or in image and text."""


class Step(NamedTuple):
    """Forward and backward of a batch: `loss` is the forward pass, `model` receives the gradients."""

    K: int
    skip_layers: Skip
    precision: str
    model: Any
    loss: Callable[[], Tensor]

    def __call__(self) -> None:
        self.model.zero_grad()
        self.loss().backward()


def with_update(step: Step, sgd: type[torch.optim.Optimizer] = torch.optim.SGD) -> Callable[[], None]:
    """A step with its update."""
    optimizer: Any = sgd([weight for weight in step.model.parameters() if weight.requires_grad], lr=1e-5, momentum=0.9)

    def train() -> None:
        step.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


class Published:
    """The published step from features at the cut, with `chosen`, its kept class ids [K] in fp32."""

    def __init__(self, inputs: Inputs, skip_layers: Skip):
        model, tokens, images, self._labels = inputs
        self._model = copy.deepcopy(model)  # the published step trains a copy of the parameters
        self._step = PublishedStep(self._model, tokens, skip_layers, RankSampler())
        self._skip_layers, self._features = skip_layers, self._step.image_features(images)
        with torch.no_grad():
            self.chosen = self._step(self._features, self._labels)[1]

    def loss(self, precision: str, class_ids: Tensor | None = None) -> Tensor:
        """Loss of the batch over `class_ids`, by default the selected classes."""
        with autocast(precision, self._features.device):
            return self._step(self._features, self._labels, class_ids)[0]

    def gradients(self, precision: str, class_ids: Tensor) -> dict[str, Tensor]:
        """Gradients of the trainable parameters, by name."""
        return gradients(self._model, self.loss(precision, class_ids))

    def step(self, precision: str, loss: Callable[[], Tensor] | None = None) -> Step:
        """The step to time."""
        loss = loss or (lambda: self.loss(precision))
        return Step(len(self.chosen), self._skip_layers, precision, self._model, loss)

    def compiled(self, precision: str, mode: str = "default") -> Step:
        """The step under torch.compile, already compiled and compared; it keeps as many classes in each step."""
        published = copy.copy(self._step)  # which keeps its own sampler
        published.sampler = _ConstantSize(RankSampler(), self._features.device)
        function = torch.compile(published.__call__, mode=mode)

        def loss(class_ids: Tensor | None = None) -> Tensor:
            with autocast(precision, self._features.device):
                return function(self._features, self._labels, class_ids)[0]

        with torch.no_grad():
            _refuse_another(loss(self.chosen), self.loss(precision, self.chosen), precision, "the compiled step")
        step = self.step(precision, loss)
        step()
        return step


class _ConstantSize:
    """Sampler that keeps as many classes in each step, as in a CUDA graph: compiled code is then for one K."""

    def __init__(self, sampler: RankSampler, device: torch.device):
        self._sampler, self._device = sampler, device

    def draw(self, num_classes: int, max_labels: int) -> Tensor:
        """Kept ranks [K]."""
        return self._sampler.draw(num_classes, max_labels, one_size=True).to(self._device)


def skip_step(
    inputs: Inputs,
    skip_layers: Skip,
    memory: str,
    precision: str,
    against: Published | None,
    text_cache: Path | None = None,
) -> Step:
    """SkipCLIP's training step from features at the cut, checked against the published step if it is given.

    Both must select the same classes in fp32 (in bf16 close scores may change their order). Over the classes that
    SkipCLIP selects in `precision`, the error of its gradients may not exceed that of the published step.
    """
    model, tokens, images, labels = inputs
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip_layers, memory=memory, text_cache=text_cache)
    features = clip.encode_lower(images)

    def loss() -> Tensor:
        with autocast(precision, images.device):
            return clip(features, labels).loss

    if against is not None:
        with torch.no_grad():
            if not clip(features, labels).class_ids.equal(against.chosen):
                raise SystemExit("the two steps choose other classes: no timing")
        with autocast(precision, images.device):
            out = clip(features, labels)
        ours = gradients(model, out.loss)
        theirs, truth = (against.gradients(each, out.class_ids) for each in (precision, "fp32"))
        _refuse_wrong(ours, theirs, truth, precision)
    K = clip.sampler.expected_keep(len(tokens), len(labels))  # each step draws another tail, rounded down or up
    return Step(K, skip_layers, precision, model, loss)


def _refuse_wrong(ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor], precision: str) -> None:
    if ours.keys() != truth.keys():
        raise SystemExit("the two steps train other parameters: no timing")
    errors = {name: tuple(relative_error(found[name], truth[name]) for found in (ours, theirs)) for name in truth}
    name, (ours_off, theirs_off) = max(errors.items(), key=lambda item: item[1][0] - item[1][1])
    print(
        f"worst gradient in {precision}, of {name}: off by {ours_off:.1e} of its norm from fp32, the published step "
        f"by {theirs_off:.1e}"
    )
    if not ours_off <= theirs_off + SLACK[precision]:
        raise SystemExit("the two steps do not agree: no timing")


def _refuse_another(loss: Tensor, expected: Tensor, precision: str, implementation: str) -> None:
    print(f"loss of {implementation} in {precision} {loss.item():.6f}, expected {expected.item():.6f}")
    if not (math.isfinite(loss) and math.isclose(loss, expected, rel_tol=_LOSS[precision])):
        raise SystemExit(f"{implementation} has another loss: no timing")


def _own_loss(inputs: Inputs, precision: str) -> Tensor:
    """The cross-entropy of the model's own logits."""
    model, tokens, images, labels = inputs
    with torch.no_grad(), autocast(precision, images.device):
        return F.cross_entropy(model.get_logits(images, tokens)[0], labels)


def full_fine_tuning(inputs: Inputs, precision: str) -> Step:
    """The step of full fine-tuning: every layer trains, from images, over all tokens of all classes.

    Its loss must be the cross-entropy of the model's own logits.
    """
    model, tokens, images, labels = inputs
    model = copy.deepcopy(model).requires_grad_(True)
    model.logit_scale.requires_grad_(False)

    def loss() -> Tensor:
        with autocast(precision, images.device):
            image = model.encode_image(images, normalize=True)
            text = model.encode_text(tokens, normalize=True)
            return F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels)

    with torch.no_grad():
        _refuse_another(loss(), _own_loss(inputs, precision), precision, "full fine-tuning")
    return Step(len(tokens), 0, precision, model, loss)


def prompt_tuning(inputs: Inputs, precision: str, tokenizer: Callable[[list[str]], Tensor]) -> Step:
    """The step of CoOp: four context vectors train, through the whole text tower of all classes, from images.

    With "a photo of a" as its context its loss must be the cross-entropy of the model's own logits.
    """
    model, tokens, images, labels = inputs
    names = class_names(len(tokens))
    no_images = Images([])
    test = TestSet("all", names, (f"{_CONTEXT} {{}}.",), no_images)
    coop = CoOp(copy.deepcopy(model), tokenizer, Task("random", "few-shot", no_images, (test,)), vectors=4)
    with torch.no_grad():
        words = tokenizer([_CONTEXT])[0, 1:5].to(images.device)
        coop.context.copy_(coop.model.token_embedding(words))

    def loss() -> Tensor:
        with autocast(precision, images.device):
            return coop.step(images, labels).loss

    with torch.no_grad():
        _refuse_another(loss(), _own_loss(inputs, precision), precision, "prompt tuning")
    return Step(len(tokens), 0, precision, torch.nn.ParameterList([coop.context]), loss)
