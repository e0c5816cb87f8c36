"""Timing of the parts of `SkipCLIP.forward`."""

from __future__ import annotations

from torch import Tensor

from ... import functional
from ...clip import SkipCLIP
from .precision import MixedPrecision
from .stage_timer import StageTimer

_ROUNDS = 10


def forward_milliseconds(clip: SkipCLIP, inputs: Tensor, labels: Tensor, precision: MixedPrecision) -> dict[str, float]:
    """Return the mean time of each part of `SkipCLIP.forward` on a batch, over ten rounds.

    Includes saving tensors for backward. Weights and the state of the class sampler do not change.
    """
    timer, sampler_state = StageTimer(inputs.device), clip.sampler.state_dict()
    for round_ in range(1 + _ROUNDS):
        with precision.autocast():
            with timer("image tower"):
                image = clip.encode_image(inputs)
            with timer("class selection"):
                class_ids, targets = clip.select(image, labels)
            with timer("text tower"):
                text = clip.encode_classes(class_ids)
            with timer("loss"):
                functional.class_sampled_ce(image, text, targets, clip.model.logit_scale.exp())
        if round_ == 0:
            timer.read()  # discard the warm-up
    clip.sampler.load_state_dict(sampler_state)
    return {part: 1000 * seconds / _ROUNDS for part, seconds in timer.read().items()}
