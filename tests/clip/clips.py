"""A small SkipCLIP, with its batch, for tests of its parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipkernels as sk
from tests.models import tiny_batch, tiny_clip, tiny_tokens

C = 17
IMAGES, LABELS = tiny_batch(4, C)


def make_clip(
    dtype: torch.dtype = torch.float64, *, seed: int = 0, tokens: Tensor | None = None, kind=sk.SkipCLIP, **options
) -> sk.SkipCLIP:
    tokens = tiny_tokens(C) if tokens is None else tokens
    return kind(tiny_clip(dtype, seed=seed), tokens, **{"skip_layers": 1, "keep_ratio": 3, "decay": 3.0, **options})


def class_weights(classes: int = C) -> Tensor:
    return torch.linspace(0.0, 2.0, classes)


def three_templates(classes: int = C) -> Tensor:
    """Prompts [C, T=3, L]; those of the three templates begin with 3, 2 and 0 shared tokens."""
    first, second, third = (tiny_tokens(classes, seed=seed) for seed in range(3))
    first = torch.cat([first[:, :1], torch.full((classes, 1), 9), first[:, 1:-1]], dim=1)
    third[:, 0] = torch.arange(classes) + 1
    return torch.stack([first, second, third], dim=1)


def mixup(labels: Tensor, share: float = 0.7) -> Tensor:
    """Soft labels [B, C] of each image mixed with the next."""
    one_hot = F.one_hot(labels, C).double()
    return share * one_hot + (1 - share) * one_hot.roll(1, 0)


def drawn(clip: sk.SkipCLIP, steps: int = 3) -> list[list[int]]:
    """Classes that each step keeps."""
    return [clip(IMAGES.to(clip.images.tower.dtype), LABELS).class_ids.tolist() for _ in range(steps)]


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(one[name].equal(value) for name, value in other.items())


def insert_lora(module: nn.Module, name: str) -> None:
    """Insert PEFT's LoRA with random factors."""
    import peft  # slow

    config = peft.LoraConfig(r=2, target_modules=[name])
    peft.inject_adapter_in_model(config, module)
    for key, parameter in module.named_parameters():
        if "lora_" in key:
            parameter.data = 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
