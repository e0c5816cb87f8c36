"""A small model, images, and a cache of their features."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import skipkernels as sk
from tests.models import tiny_clip, tiny_tokens

CLASSES = 4


def skip_clip(model: nn.Module | None = None, skip: int = 1) -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(torch.float32) if model is None else model, tiny_tokens(7), skip_layers=(skip, 1))


def pictures(count: int, size: int = 16, *, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def images(count: int = 23, size: int = 16, *, seed: int = 0) -> TensorDataset:
    return TensorDataset(pictures(count, size, seed=seed), torch.arange(count) % CLASSES)


class Drawn(Dataset):
    """Images with a random transform that draws from PyTorch's, NumPy's and Python's generators."""

    def __init__(self, count: int = 8, *, seed: int = 0):
        self.pictures = pictures(count, seed=seed)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        moved = torch.rand(3, 1, 1) + random.random() + np.random.rand()
        return self.pictures[item] + moved.float(), item % CLASSES


def build(path: Path, dataset: Any = None, clip: sk.SkipCLIP | None = None, **arguments: Any) -> sk.FeatureCache:
    """Build an fp32 cache in batches of four images, by default of the small model."""
    dataset = images() if dataset is None else dataset
    arguments = {"dtype": "fp32", "batch_size": 4, "progress": False} | arguments
    return sk.FeatureCache.build(path, skip_clip() if clip is None else clip, dataset, **arguments)


def read_epoch(loader: sk.FeatureLoader) -> Tensor:
    """Read the features of an epoch, or of the rest of one."""
    return torch.cat([features for features, _ in loader])
