"""What the forward of a step of Skip Tuning spends its time on."""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..clip import SkipCLIP
from .precision import Arithmetic
from .stage_timer import Budget

_ROUNDS = 10


def forward_milliseconds(clip: SkipCLIP, inputs: Tensor, labels: Tensor, arithmetic: Arithmetic) -> dict[str, float]:
    """Mean time of each part of the forward of a batch, over ten steps that are no steps of the run.

    The parts are those of `SkipCLIP.forward`, one after the other, with all that they keep for backward. Nothing
    trains, and the draws of classes go on as if there had been none.

    Args:
        clip: As it trains.
        inputs: Features at the cut [B, N, W], or images [B, 3, H, W].
        labels: int64 [B].
        arithmetic: The precision of the run.
    """
    budget, draws = Budget(inputs.device), clip.sampler.state_dict()
    for round_ in range(1 + _ROUNDS):
        with arithmetic.autocast():
            with budget("image tower"):
                image = clip.encode_image(inputs)
            with budget("class selection"):
                class_ids, targets = clip.select(image, labels)
            with budget("text tower"):
                text = clip.encode_classes(class_ids)
            with budget("loss"):
                functional.class_sampled_ce(image, text, targets, clip.model.logit_scale.exp())
        if round_ == 0:
            budget.read()  # the first is for warming up
    clip.sampler.load_state_dict(draws)
    return {part: 1000 * seconds / _ROUNDS for part, seconds in budget.read().items()}
