"""A tuned model as a plain module, for `torch.export` and ONNX."""

from __future__ import annotations

from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """Images [B, 3, height, width] to logits [B, C], over fixed class embeddings.

    logits = scale · cos(image, class)

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
