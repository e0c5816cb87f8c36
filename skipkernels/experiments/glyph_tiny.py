"""`glyph-tiny`: a small CLIP that ships with the package, with an open_clip model config.

It was pre-trained on `glyphs` without the held-out blocks and fonts; `examples/pretrain_glyph_tiny.py` reproduces it.
The file holds half-precision weights. Of the token embedding it has only the rows of `token_ids`, the tokens in the
names of glyphs; the other rows are random, so that untrained tokens are distinct.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from safetensors.torch import load_file

from ..store import replace_file, write_tensors
from . import glyphs

NAME = "glyph-tiny"
CONFIG = Path(__file__).with_name("glyph-tiny.json")
WEIGHTS = Path(__file__).with_name("glyph-tiny.safetensors")

_ROW_STD = 0.05  # standard deviation of the token embedding's rows in the file


def register() -> None:
    """Add the model config of `glyph-tiny` to open_clip; idempotent."""
    if NAME not in open_clip.list_models():
        open_clip.add_model_config(CONFIG)


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
    replace_file(path, lambda file: write_tensors(file, state, {}))


def state_dict(path: Path = WEIGHTS) -> dict[str, torch.Tensor]:
    """Read the weights in fp32, for `open_clip.CLIP.load_state_dict`."""
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    rows, token_ids = state["token_embedding.weight"], state.pop("token_ids")
    vocabulary = open_clip.get_model_config(NAME)["text_cfg"]["vocab_size"]
    # With rows of zeros, all names of untrained tokens would have one embedding. Uniform: bit-exact on every CPU.
    drawn = torch.rand(vocabulary, rows.shape[1], generator=torch.Generator().manual_seed(0))
    drawn = (drawn - 0.5) * (_ROW_STD * 12**0.5)
    state["token_embedding.weight"] = drawn.index_copy_(0, token_ids, rows)
    return state
