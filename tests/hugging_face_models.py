"""Small `CLIPModel` and `SiglipModel` of transformers with random weights in fp64, for tests."""

from __future__ import annotations

import torch
import transformers
from models import random_weights

SMALL = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}


def hugging_face_clip(end: int = 2, activation: str = "quick_gelu", **attention) -> torch.nn.Module:
    text = {
        **SMALL,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "vocab_size": 60,
        "eos_token_id": end,
        "projection_dim": 12,
    }
    vision = {**SMALL, "image_size": 16, "patch_size": 8, "projection_dim": 12}
    config = transformers.CLIPConfig(
        text_config={**text, "hidden_act": activation},
        vision_config={**vision, "hidden_act": activation},
        projection_dim=12,
    )
    torch.manual_seed(0)
    return random_weights(transformers.AutoModel.from_config(config, **attention))


def siglip(**attention) -> torch.nn.Module:
    text = {**SMALL, "vocab_size": 60, "max_position_embeddings": 77, "projection_size": 24}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    return random_weights(transformers.AutoModel.from_config(config, **attention))
