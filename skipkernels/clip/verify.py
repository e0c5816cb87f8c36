"""Comparison of both encoders with the model itself, at construction and `refresh`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..towers import TextTower, deterministic_training, evaluating
from ..towers.agreement import Pair, check_agreement
from ..towers.text_store import representative_classes
from .image_encoder import ImageEncoder
from .text_encoder import TextEncoder


def verify(model: nn.Module, image_encoder: ImageEncoder, text_encoder: TextEncoder, tokens: Tensor) -> None:
    """Compare embeddings and gradients of a random image and a few classes with those of the model, in both modes.

    Sets `image_encoder.features`. `tokens` [C, L], or [C, T, L], are the prompts before cropping.
    """
    image_tower, device = image_encoder.tower, text_encoder.tower.tokens.device
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *image_tower.image_size, generator=generator).to(device, image_tower.dtype)
    text_parameters = list(text_encoder.tower.upper_parameters())
    # Cached features are rounded to half precision, unlike those of the model in this comparison.
    half = any(torch.finfo(parameter.dtype).bits < 32 for parameter in text_parameters)

    def encode_image() -> Tensor:
        return image_tower.upper(image_encoder.lower(image))

    def texts_of(number: int, tower: TextTower) -> Pair:
        class_ids = representative_classes(tower)
        prompts = (tokens[:, number] if tokens.ndim == 3 else tokens)[class_ids.to(tokens.device)].to(device).long()
        return Pair(
            "texts",
            lambda: tower.reference_forward(prompts),
            lambda: text_encoder.encoders(cached=not half)[number](class_ids),
            text_parameters,
        )

    pairs = [
        *(texts_of(number, tower) for number, tower in enumerate(text_encoder.towers)),
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
