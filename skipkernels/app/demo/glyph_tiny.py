"""`glyph-tiny`: a small CLIP that ships with the package, with an open_clip model config.

It was pre-trained on `glyphs` without the held-out blocks and fonts; `examples/pretrain_glyph_tiny.py` reproduces it.
The file contains fp16 weights, and of the token embedding only the rows `token_ids`, the tokens in the names of glyphs.
`state_dict` fills the other rows with random numbers, so that untrained tokens are distinct.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file

from ...folders import replace_tensors
from ..methods.registry import PackagedModel
from ..train.model import load_model
from . import glyphs

NAME = "glyph-tiny"
CONFIG = Path(__file__).with_name("glyph-tiny.json")
WEIGHTS = Path(__file__).with_name("glyph-tiny.safetensors")

_ROW_STD = 0.05  # standard deviation of the token embedding's rows in the file

# Published rates are for CLIP models trained on hundreds of millions of images; glyph-tiny was trained on half a
# million small ones. At those rates its accuracy does not change in 20 epochs; at rates at which it changes, warm-up
# does not help. Full fine-tuning also changes the lower blocks, and is best at a tenth of the rate. All rates were
# chosen on seed 10 by the harmonic mean: for skip and full from six pairs of rates, for CLIP-Adapter from five rates,
# for LoRA and CoOp from three. The published rate was best for CoOp. LoRA's published 320 epochs take an hour on two
# cores.
_RECIPES: dict[str, dict[str, Any]] = {
    "skip": {"epochs": 8, "text_lr": 4e-3, "image_lr": 2e-3, "warmup_epochs": 0, "warmup_lr": 0.0},
    "full": {"epochs": 8, "text_lr": 5e-4, "image_lr": 2e-4, "warmup_epochs": 0, "warmup_lr": 0.0},
    "clip-adapter": {"image_lr": 0.2},
    "lora": {"epochs": 20, "text_lr": 1e-3, "image_lr": 1e-3},
}

# On data other than glyphs, zero-shot accuracy is at chance. There SGD makes all class embeddings alike, and separates
# them slowly. CSkip ranks classes by zero-shot similarity, so nearly the same classes are the negatives of every batch:
# with batches of one class, the other classes are hardly ever negatives, and all images are assigned to them. In a
# mixed batch, the classes of the other images are negatives too. Optimizers and rates are those that `python -m
# bench.when` chose on emoji, from four of each method on seed 10. Full fine-tuning has a third of the rate: batches are
# of 4 images here and of 16 there. The published rate was best for CoOp.
_RECIPES_OTHER_DATA: dict[str, dict[str, Any]] = {
    "skip": {"optimizer": "adamw", "text_lr": 1e-3, "image_lr": 1e-3, "sampler": "random"},
    "full": {"optimizer": "adamw", "text_lr": 3e-4, "image_lr": 3e-4},
    "clip-adapter": {"image_lr": 0.3},
    "lora": {"text_lr": 5e-3, "image_lr": 5e-3},
}


def register() -> None:
    """Add the model config of `glyph-tiny` to open_clip; idempotent."""
    if NAME not in open_clip.list_models():
        open_clip.add_model_config(CONFIG)


def load() -> tuple[Any, Callable, Callable]:
    """Return the model with its weights, in evaluation mode on the CPU, its image transform and its tokenizer."""
    return load_model(NAME, None, torch.device("cpu"))


def used_token_ids() -> torch.Tensor:
    """Return the sorted ids of the tokens in the prompts of all named characters of `glyphs.BLOCKS`."""
    register()
    tokenizer = open_clip.get_tokenizer(NAME)
    codepoints = [
        c for first, last in glyphs.BLOCKS.values() for c in range(first, last + 1) if glyphs.character_name(c)
    ]
    drawn = set().union(*(glyphs.distinct_characters(codepoints, font) for font in glyphs.FONTS))
    prompts = [glyphs.TEMPLATE.format(glyphs.character_name(c)) for c in sorted(drawn)]
    return torch.unique(tokenizer(prompts))


def save(model: torch.nn.Module, path: Path) -> None:
    """Write the weights of a model of this config to a file that `state_dict` reads."""
    state = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    state["token_ids"] = used_token_ids()
    state["token_embedding.weight"] = state["token_embedding.weight"][state["token_ids"]]
    replace_tensors(path, state)


def state_dict(path: Path = WEIGHTS) -> dict[str, torch.Tensor]:
    """Read the weights in fp32, for `open_clip.CLIP.load_state_dict`."""
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    rows, token_ids = state["token_embedding.weight"], state.pop("token_ids")
    vocabulary = open_clip.get_model_config(NAME)["text_cfg"]["vocab_size"]
    # With rows of zeros, all names of untrained tokens would have one embedding. torch.rand is bit-exact on any CPU.
    drawn = torch.rand(vocabulary, rows.shape[1], generator=torch.Generator().manual_seed(0))
    drawn = (drawn - 0.5) * (_ROW_STD * 12**0.5)
    state["token_embedding.weight"] = drawn.index_copy_(0, token_ids, rows)
    return state


def recipe(method: str, data: str) -> dict[str, Any]:
    """Fields of a method's recipe that this model changes for a dataset.

    >>> recipe("clip-adapter", "glyphs:greek")
    {'image_lr': 0.2}
    """
    on_glyphs = data.partition(":")[0] == "glyphs"
    return _RECIPES.get(method, {}) | ({} if on_glyphs else _RECIPES_OTHER_DATA.get(method, {}))


PACKAGED = PackagedModel(CONFIG, state_dict, recipe)
