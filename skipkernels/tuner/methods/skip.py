"""Skip Tuning: the blocks above a cut, on the classes that matter for each batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ...data import Protocol, Task
from ...selection import Tail
from ...towers import Memory
from ...towers.attention import AttentionName
from .base import Recipe, StepOutput, Tokenizer, TunedModel


class Skip(TunedModel):
    """Skip Tuning (Wu et al., CVPR 2025), by `SkipCLIP`.

        loss = mean over b of −log softmax_k(exp(logit_scale) · ⟨x̂_b, t̂_k⟩)[label_b],   k over the kept classes

    Trains the blocks above the cut and the heads of both towers, from features at the cut that are computed once.
    Before training the logits are those of zero-shot.

    Args:
        model: As SkipCLIP takes it.
        tokenizer: Its tokenizer.
        task: What it is tuned to.
        skip_layers: Blocks skipped in each tower: a number, or a fraction of them.
        keep_ratio: Share of classes that always stay in a step (up to 1), or their number.
        max_keep: Most classes that always stay.
        decay: How slowly the chance to stay falls over the other classes.
        tail: "resample" draws these anew in each step, "fixed" once, as published.
        memory: What a block keeps for backward, as for SkipCLIP.
        attention: Who computes attention, as for SkipCLIP.
        generator: Of the draws.
        text_cache: Folder to keep the texts' features at the cut in, a folder for each test; in memory by default.

    Raises:
        InputError: If SkipCLIP does not take this model or a setting.

    Source: Wu et al., "Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters
    Themselves", CVPR 2025, arXiv 2412.11509.

    Example:
        >>> Skip.recipe("ViT-B-16", "few-shot", shots=16).epochs
        40
    """

    name = "skip"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        task: Task,
        *,
        skip_layers: int | float = 0.5,
        keep_ratio: float = 0.5,
        max_keep: int = 50,
        decay: float = 0.3,
        tail: Tail = "resample",
        memory: Memory = "auto",
        attention: AttentionName = "sdpa",
        generator: torch.Generator | None = None,
        text_cache: str | Path | None = None,
    ):
        super().__init__(
            model,
            tokenizer,
            task,
            skip_layers=skip_layers,
            keep_ratio=keep_ratio,
            max_keep=max_keep,
            decay=decay,
            tail=tail,
            memory=memory,
            attention=attention,
            generator=generator,
            text_cache=text_cache,
        )
        self.cut = self.clip if self.clip.skip_layers[0] > 0 else None

    @classmethod
    def _published(cls, protocol: Protocol, shots: int, classes: int) -> Recipe:
        epochs, text_lr, image_lr, warmup_epochs, warmup_lr = {
            "base-to-new": (20, 2e-5, 5e-6, 1, 1e-6),
            "cross-dataset": (20, 1e-5, 1e-6, 1, 1e-8),
            "domain-generalization": (20, 1e-5, 1e-6, 1, 1e-8),
            "few-shot": (40, 1e-5, 1e-5, 0, 0.0),
        }[protocol]
        return Recipe(
            epochs=epochs,
            batch_size=4,
            optimizer="sgd",
            text_lr=text_lr,
            image_lr=image_lr,
            momentum=0.9,
            weight_decay=5e-4,
            warmup_epochs=warmup_epochs,
            warmup_lr=warmup_lr,
            sampler="class_pure",
        )

    @torch.no_grad()
    def encode_frozen(self, images: Tensor) -> Tensor:
        """Features at the cut [B, N, W] of images [B, 3, H, W]; the images where no block of theirs is skipped."""
        return images if self.cut is None else self.cut.encode_lower(images)

    def step(self, inputs: Tensor, labels: Tensor) -> StepOutput:
        """The loss of a batch over the classes that are kept for it."""
        out = self.clip(inputs, labels)
        return StepOutput(out.loss, len(out.class_ids))
