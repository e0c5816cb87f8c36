"""Settings of SkipCLIP, their checks, and their application to the towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..options import AttentionName
from ..towers import ImageTower, Memory, TextTower, xformers
from ..towers.attention import SDPA, AttentionBackend
from ..towers.block import FusedBlock

Trainable = Literal["upper", "as_is"]


class Settings(NamedTuple):
    """Arguments of SkipCLIP that construction and `refresh` apply to the towers."""

    skip_layers: tuple[int | float, int | float]
    memory: Memory
    attention: AttentionName
    trainable: Trainable
    train_logit_scale: bool

    @classmethod
    def checked(
        cls, skip_layers: Any, memory: Memory, attention: AttentionName, trainable: Trainable, train_logit_scale: bool
    ) -> Settings:
        """Return settings, or raise if an argument is invalid for every model."""
        if memory not in get_args(Memory):
            raise ValueError(f'SkipCLIP: memory must be "auto", "fast" or "min"; got {memory!r}.')
        if attention not in get_args(AttentionName):
            raise ValueError(f'SkipCLIP: attention must be "sdpa" or "xformers"; got {attention!r}.')
        if trainable not in get_args(Trainable):
            raise ValueError(f'SkipCLIP: trainable must be "upper" or "as_is"; got {trainable!r}.')
        pair = skip_layers if isinstance(skip_layers, tuple) else (skip_layers, skip_layers)
        if len(pair) != 2:
            raise ValueError(f"SkipCLIP: skip_layers must be one number or a pair (image, text); got {skip_layers!r}.")
        return cls(pair, memory, attention, trainable, train_logit_scale)

    def apply(self, image: ImageTower, texts: Sequence[TextTower]) -> None:
        """Set cut, memory mode and attention backend of the towers; raise a ValueError if a tower can't use one."""
        backend = SDPA if self.attention == "sdpa" else _xformers(image, texts[0])
        for tower, name in ((image, "image"), *((text, "text") for text in texts)):
            skip = blocks_to_skip(self.skip_layers[name == "text"], len(tower.blocks), name)
            tower.memory, tower.skip, tower.attention_backend = self.memory, skip, backend


def blocks_to_skip(skip: int | float, depth: int, tower: str) -> int:
    """Number of skipped blocks among the `depth` blocks of a tower.

    >>> blocks_to_skip(0.5, 12, "image"), blocks_to_skip(5, 12, "text")
    (6, 5)
    """
    number = not isinstance(skip, bool) and isinstance(skip, (int, float))
    blocks = round(skip * depth) if isinstance(skip, float) and 0.0 <= skip <= 1.0 else skip
    if not (number and 0 <= blocks <= depth and blocks == int(blocks)):
        raise ValueError(
            f"SkipCLIP: skip_layers must be a whole number from 0 to {depth} for the {tower} tower, or a fraction of "
            f"its blocks such as 0.5, or a tuple (image, text) of either; got {skip!r}."
        )
    return int(blocks)


def _xformers(image: ImageTower, text: TextTower) -> AttentionBackend:
    device = image.model.logit_scale.device
    for tower in (image, text):
        block = tower.blocks[0]
        if isinstance(block, FusedBlock) and block.why_not_fused() is None:
            weights, _, _, heads = block._read()
            reason = xformers.why_unavailable(device, weights.fc.dtype, weights.fc.shape[1] // heads)
            if reason is not None:
                raise ValueError(
                    f'SkipCLIP: attention="xformers" cannot be used here: {reason} Leave it at "sdpa", or use a GPU '
                    "and an xformers that was built for this PyTorch."
                )
    return xformers.backend()


def check_tokens(tokens: Any) -> None:
    """Raise unless tokens are an integer tensor [C, L] or [C, T, L]."""
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"SkipCLIP: tokens must be an int64 tensor [C, L] or [C, T, L]; got {type(tokens).__name__}. Tokenise one "
            "prompt for each class; from the output of a transformers tokenizer take input_ids."
        )
    if tokens.ndim not in (2, 3) or tokens.numel() == 0 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"SkipCLIP: tokens must be int64 [C, L], or [C, T, L] for T templates, with C, T and L ≥ 1; got "
            f"{tokens.dtype} {list(tokens.shape)}. Tokenise the prompts of each class with the model's own tokenizer."
        )


def check_vocabulary(tokens: Tensor, vocabulary: int | None) -> None:
    """Raise if a token id is outside the vocabulary of the model."""
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or (vocabulary is not None and largest >= vocabulary):
        raise ValueError(
            f"SkipCLIP: tokens must be ids in [0, {vocabulary}), the model's vocabulary; got {smallest} to {largest}. "
            "Use the model's own tokenizer."
        )


def prompts_of(tokens: Tensor) -> Tensor:
    """Tokens [C, L], or [C, T, L] for several templates, int32 on the CPU."""
    return (tokens[:, 0] if tokens.ndim == 3 and tokens.shape[1] == 1 else tokens).to("cpu", torch.int32)
