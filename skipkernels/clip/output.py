"""Result of a step of SkipCLIP."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class _Fields(NamedTuple):
    loss: Tensor
    kept_logits: Tensor | None
    class_ids: Tensor
    targets: Tensor


class SkipOutput(_Fields):
    """Result of a step: a named tuple.

    Attributes:
        loss: [], mean cross-entropy over the batch, weighted if SkipCLIP has class weights; of `sigmoid_loss`, the mean
            over images and classes.
        logits: [B, K]. In training they are computed with `return_logits` and by `sigmoid_loss` only; else the item
            `kept_logits` of the tuple is None, and reading the attribute raises an AttributeError.
        class_ids: [K] int64, ascending, the kept classes; in evaluation all classes, K = C.
        targets: [B] int64, positions of the labels in `class_ids`; of `sigmoid_loss` bool [B, K],
            the labels themselves.
    """

    __slots__ = ()

    @property
    def logits(self) -> Tensor:  # noqa: D102
        if (logits := self.kept_logits) is None:
            raise AttributeError(
                "SkipOutput.logits: this training step did not compute logits. Call clip(x, labels, "
                "return_logits=True) for those of the kept classes, or clip.predict(x) for those of all classes."
            )
        return logits
