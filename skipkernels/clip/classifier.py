"""A tuned model as a plain module, for `torch.export` and ONNX."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from .skip_clip import SkipCLIP


class AffineHead(Protocol):
    """Classifier of unit-norm image embeddings, such as a `skipkernels.app.heads.Head`: weight [C, D] and bias [C]."""

    @property
    def weight(self) -> Tensor: ...  # noqa: D102

    @property
    def bias(self) -> Tensor: ...  # noqa: D102


class ImageClassifier(nn.Module):
    """Images [B, 3, height, width] to logits [B, C].

        z_bc = ⟨weight_c, x_b/|x_b|⟩ + bias_c

    Args:
        encoder: Module that returns embeddings x [B, D] of images, or a tuple with the embeddings first.
        weight: [C, D].
        bias: [C]. Default: zero.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, encoder: nn.Module, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", weight.new_zeros(len(weight)) if bias is None else bias.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C]."""
        image = self.encoder(images)
        image = image[0] if isinstance(image, tuple) else image
        return nn.functional.normalize(image.to(self.weight.dtype), dim=-1) @ self.weight.T + self.bias


def classifier_of(clip: SkipCLIP, head: AffineHead | None) -> ImageClassifier:
    """Return the module of the image tower and a head, or the class embeddings; see `SkipCLIP.classifier`."""
    encoder = _sharing_weights(clip.images.tower.encoder(), clip.model)
    if head is not None:
        return ImageClassifier(encoder, head.weight, head.bias).eval()
    text = clip.class_embeddings()
    return ImageClassifier(encoder, clip.scale.to(text.dtype) * text).eval()


def _sharing_weights(part: Any, model: nn.Module) -> Any:
    """Copy a part of a model: the copies have their own mode, and share the parameters and buffers of the model."""
    return copy.deepcopy(part, {id(x): x for x in (*model.parameters(), *model.buffers())})
