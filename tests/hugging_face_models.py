"""Small models of transformers in the structure of CLIP and SigLIP with random weights in fp64, for tests."""

from __future__ import annotations

import torch
import transformers

from tests.models import random_weights

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


def hugging_face_clip(
    end: int = 2, activation: str = "quick_gelu", config: type = transformers.CLIPConfig, **attention
) -> torch.nn.Module:
    both = SMALL | {"projection_dim": 12, "hidden_act": activation}
    text = both | {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 60, "eos_token_id": end}
    vision = both | {"image_size": 16, "patch_size": 8}
    chosen = config(text_config=text, vision_config=vision, projection_dim=12)
    torch.manual_seed(0)
    return random_weights(transformers.AutoModel.from_config(chosen, **attention))


def metaclip_2() -> torch.nn.Module:
    return hugging_face_clip(end=59, config=transformers.MetaClip2Config)


def siglip(config=transformers.SiglipConfig, vision=None, **attention) -> torch.nn.Module:
    text = {**SMALL, "vocab_size": 60, "max_position_embeddings": 77, "projection_size": 24}
    vision = {**SMALL, "patch_size": 8, **(vision or {"image_size": 16})}
    torch.manual_seed(0)
    chosen = config(text_config=text, vision_config=vision)
    return random_weights(transformers.AutoModel.from_config(chosen, **attention))


def siglip_2(**attention) -> torch.nn.Module:
    """Model that takes patches; at 16 × 16 pixels its positions, a grid of 3 × 3, are interpolated."""
    return siglip(transformers.Siglip2Config, {"num_patches": 9}, **attention)


def patches_of(images: torch.Tensor, padding: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `siglip_2` as its processor makes them of images, with patches of padding behind them."""
    steps = {f"do_{step}": False for step in ("resize", "rescale", "normalize", "convert_rgb")}
    count = (images.shape[2] // 8) * (images.shape[3] // 8) + padding
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=count, **steps)
    return dict(processor(list(images), return_tensors="pt"))
