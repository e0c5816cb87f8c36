"""Comparison of both encoders with the model itself, at construction and `refresh`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..towers import deterministic_training, evaluating
from ..towers.agreement import Pair, check_agreement
from ..towers.text_store import representative_classes
from .image_encoder import ImageEncoder
from .text_encoder import TextEncoder


def verify(model: nn.Module, image_encoder: ImageEncoder, text_encoder: TextEncoder, tokens: Tensor) -> None:
    """Compare embeddings and gradients of a random image and a few classes with those of the model.

    In evaluation and in training mode. Sets `image_encoder.features`. `tokens` [C, L] are the prompts before cropping.

    Raises:
        RuntimeError: If they differ.
    """
    image_tower, text_tower = image_encoder.tower, text_encoder.tower
    device, class_ids = text_tower.tokens.device, representative_classes(text_tower)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *image_tower.image_size, generator=generator).to(device, image_tower.dtype)
    tokens = tokens.to(device).long()[class_ids]
    text_parameters = list(text_tower.upper_parameters())
    # Cached features are rounded to half precision, unlike those of the model in this comparison.
    half = any(torch.finfo(parameter.dtype).bits < 32 for parameter in text_parameters)
    encode_texts = text_encoder.encode_uncached if half else text_encoder.encode

    def encode_image() -> Tensor:
        return image_tower.upper(image_encoder.lower(image))

    pairs = [
        Pair("texts", lambda: text_tower.reference_forward(tokens), lambda: encode_texts(class_ids), text_parameters),
        Pair(
            "an image", lambda: image_tower.reference_forward(image), encode_image, list(image_tower.upper_parameters())
        ),
    ]
    with evaluating([model]):
        with torch.no_grad():
            features = image_encoder.lower(image)
        image_encoder.features = features.shape[1:], features.dtype
        for pair in pairs:
            check_agreement(pair, "evaluation", gradients=False)
    with deterministic_training(model):
        for pair in pairs:
            check_agreement(pair, "training", gradients=True)
