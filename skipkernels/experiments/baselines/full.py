"""Full fine-tuning, as one would write it: what Skip Tuning is compared with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...data import Protocol, Task
from ...tuner.methods.base import Recipe, StepOutput, Tokenizer, TunedModel, check_open_clip, compare, unit_norm
from ...tuner.methods.skip import Skip


class Full(TunedModel):
    """Full fine-tuning: every layer of both towers, every class, every token, on images.

        loss = mean over b of −log softmax_c(exp(logit_scale) · ⟨x̂_b, t̂_c⟩)[label_b],   c over all classes

    Only the temperature stays. The step is the model's own, in plain PyTorch; tests are SkipCLIP's, with nothing
    skipped, which embeds each class once. Before training the logits are those of zero-shot.

    It trains by the recipe of Skip Tuning, whose paper has it as its baseline, but on random batches.

    Args:
        model: An open_clip model.
        tokenizer: Its tokenizer.
        task: What it is tuned to.
        generator: Not used: nothing is drawn.

    Raises:
        InputError: If it is no model of open_clip, or one that SkipCLIP does not take.

    Source: Wu et al., CVPR 2025, arXiv 2412.11509, section 3 (the baseline).

    Example:
        >>> Full.recipe("glyph-tiny", "base-to-new", shots=16).text_lr
        0.0005
    """

    name = "full"

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, task: Task, *, generator: torch.Generator | None = None):
        check_open_clip(self.name, model)
        super().__init__(model, tokenizer, task, skip_layers=0, generator=generator)

    @classmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        return replace(Skip._published(protocol, shots, classes), sampler="random")

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """The loss of images [B, 3, H, W] over all classes."""
        image = self.model.encode_image(inputs, normalize=False)
        text = self.encode_texts(self._of(self._tuned)[0])
        return compare(image, unit_norm(text), labels, self.model.logit_scale)
