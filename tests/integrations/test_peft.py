"""Adapters of PEFT above the cut of a Hugging Face model, as in docs/more-trainers.md, against plain training."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
import transformers
from models import random_weights, tiny_batch, tiny_tokens
from torch import Tensor

import skipkernels as sk

CLASSES, SKIP, LAYERS, STEPS = 5, 1, 3, 20


def adapted() -> Any:
    """A CLIPModel with LoRA on the attention of every block above the cut."""
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    text = {**size, "vocab_size": 60, "eos_token_id": 2}  # with 2, the largest token id is the end
    vision = {**size, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = random_weights(transformers.CLIPModel(clip)).float()
    blocks = "|".join(str(depth) for depth in range(SKIP, LAYERS))
    targets = rf".*layers\.({blocks})\.self_attn\.(q|v)_proj"
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return peft.inject_adapter_in_model(config, model)


def train(model: Any, loss: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [STEPS], and the adapters in the end."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        rows = slice(2 * step, 2 * step + 2)
        optimizer.zero_grad()
        losses.append(loss(images[rows], labels[rows]))
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach(), peft.get_peft_model_state_dict(model)


def test_lora_trains_as_in_the_plain_model():
    tokens, (images, labels) = tiny_tokens(CLASSES), tiny_batch(2 * STEPS, CLASSES, torch.float32)
    plain, ours = adapted(), adapted()
    start = copy.deepcopy(peft.get_peft_model_state_dict(plain))
    clip = sk.SkipCLIP(ours, tokens, skip_layers=SKIP, keep_ratio=1.0, trainable="as_is")
    assert all("lora_" in name for name, p in ours.named_parameters() if p.requires_grad)
    assert not clip.reductions["image.fused_block"].enabled  # those with adapters run as modules

    def plain_loss(images: Tensor, labels: Tensor) -> Tensor:
        logits = plain(input_ids=tokens, pixel_values=images).logits_per_image
        return torch.nn.functional.cross_entropy(logits, labels)

    plain.logit_scale.requires_grad_(False)
    losses, weights = train(plain.train(), plain_loss, images, labels)
    found, adapters = train(ours, lambda x, y: clip(x, y).loss, images, labels)
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=0)
    assert adapters.keys() == weights.keys() and len(weights) == 2 * 2 * 2 * (
        LAYERS - SKIP
    )  # A, B of q, v in each tower
    for name, value in weights.items():
        moved = value - start[name]
        assert (adapters[name] - value).norm() <= 1e-3 * moved.norm(), name
