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


def small_clip(
    group: Any = None,
    *,
    dtype: torch.dtype = torch.float64,
    templates: int = 1,
    weights: bool = False,
    replace: int | None = None,
    **options: Any,
) -> sk.SkipCLIP:
    """SkipCLIP, or ShardedSkipCLIP of a group; with `weights` of the classes, which `replace` other classes replace."""
    options = {"skip_layers": 1 / 3, "keep_ratio": 4, "decay": 0.3} | options
    if weights:
        options["class_weight"] = torch.arange(1, CLASSES + 1) / 4
    if group is not None:
        options["process_group"] = group
    kind = sk.SkipCLIP if group is None else sk.parallel.ShardedSkipCLIP
    clip = kind(tiny_clip(dtype), tokens_of(templates), **options)
    if replace is not None:
        clip.set_classes(tiny_tokens(replace, seed=7))
    return clip
