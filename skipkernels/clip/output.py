"""Results of SkipCLIP: of a step, and the tuned model as a plain module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


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


class ImageClassifier(nn.Module):
    """A tuned model as a plain module, for `torch.export` and ONNX: images [B, 3, height, width] to logits [B, C].

    logits = scale · cos(image, class), over fixed class embeddings.

    Args:
        encoder: Module that returns embeddings [B, D] of images, or a tuple with the embeddings first.
        class_embeddings: [C, D], unit norm.
        scale: [], the exponential of `logit_scale`.
    """

    class_embeddings: Tensor
    scale: Tensor

    def __init__(self, encoder: nn.Module, class_embeddings: Tensor, scale: Tensor):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("class_embeddings", class_embeddings.detach().clone())
        self.register_buffer("scale", scale.detach().clone().to(class_embeddings.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        image = self.encoder(images)
        image = image[0] if isinstance(image, tuple) else image
        image = nn.functional.normalize(image.to(self.class_embeddings.dtype), dim=-1)
        return self.scale * image @ self.class_embeddings.T
