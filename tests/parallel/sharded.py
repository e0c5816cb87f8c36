"""A small SkipCLIP, and the same one of several processes."""

from __future__ import annotations

from typing import Any

import torch

import skipkernels as sk
from tests.models import tiny_clip, tiny_tokens

CLASSES = 18


def tokens_of(templates: int) -> torch.Tensor:
    every = [tiny_tokens(CLASSES, seed=seed + 1) for seed in range(templates)]  # without equal prompts, which tie
    return torch.stack(every, dim=1) if templates > 1 else every[0]


def small_clip(group: Any = None, *, templates: int = 1, dtype: torch.dtype = torch.float64, **settings) -> sk.SkipCLIP:
    settings = {"skip_layers": 1 / 3, "keep_ratio": 4, "decay": 0.3} | settings
    if settings.pop("weights", False):
        settings["class_weight"] = torch.arange(1, CLASSES + 1) / 4
    replace = settings.pop("replace", None)
    model, tokens = tiny_clip(dtype), tokens_of(templates)
    if group is None:
        clip = sk.SkipCLIP(model, tokens, **settings)
    else:
        clip = sk.parallel.ShardedSkipCLIP(model, tokens, process_group=group, **settings)
    if replace is not None:
        clip.set_classes(tiny_tokens(replace, seed=7))
    return clip
