"""`pictogram-tiny`: a small CLIP that is packaged with its weights and an open_clip model config.

It was pre-trained on the icons of 150 sets and their names, without the sets of `pictograms`; the recipe is in
`recipes/pictograms`, the licences are in `LICENSES-pictograms`. Its image tower, `vit_pictogram`, is a vision
transformer of timm, which importing this module registers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..methods.registry import PACKAGED
from ..train.model import load_model
from . import vit_pictogram  # noqa: F401 (registers the image tower)

NAME = PACKAGED
CONFIG = Path(__file__).with_name(f"{NAME}.json")
WEIGHTS = Path(__file__).with_name(f"{NAME}.safetensors")

# The published recipes are for models trained on hundreds of millions of images. These learning rates have the best
# harmonic mean in the search of `python -m bench.when`, on names that no reported run has; that of skip, among rates
# that do not lower the accuracy on new classes. The sampler is random, as a class has two images. LoRA has 8 epochs, as
# its published 320 take an hour.
_MIXED = dict(epochs=8, batch_size=16, sampler="random", optimizer="adamw", warmup_epochs=0, warmup_lr=0.0)
RECIPES: dict[str, dict[str, Any]] = {
    "skip": {**_MIXED, "text_lr": 3e-4, "image_lr": 3e-4},
    "full": {**_MIXED, "text_lr": 3e-4, "image_lr": 3e-4},
    "lora": {**_MIXED, "text_lr": 2e-3, "image_lr": 2e-3},
    "clip-adapter": {"image_lr": 0.02},
}
"""By name of a method, the fields of its `Recipe` that differ from the published ones."""


def register() -> None:
    """Add the model config of `pictogram-tiny` to open_clip; idempotent."""
    if NAME not in open_clip.list_models():
        open_clip.add_model_config(CONFIG)


def load() -> tuple[Any, Callable, Callable]:
    """Return the model with its weights, in evaluation mode on the CPU, its image transform and its tokenizer."""
    return load_model(NAME, None, torch.device("cpu"))


def state_dict() -> dict[str, Tensor]:
    """Read the weights in fp32, for `load_state_dict`."""
    return {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}
