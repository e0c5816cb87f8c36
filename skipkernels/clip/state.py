"""Extra state of SkipCLIP in a state dict: a uint8 tensor with the bytes of a safetensors file."""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..store import digest_tensors

_FORMAT = "1"


def pack_state(prototypes: Tensor, tokens: Tensor, sampler: dict[str, Tensor]) -> Tensor:
    """Pack prototypes, a digest of the tokens, and the state of the sampler into uint8 [n]."""
    tensors = {"prototypes": prototypes.cpu(), "prompts": _digest(tokens)} | sampler
    data = safetensors.torch.save(tensors, metadata={"format": _FORMAT})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def unpack_state(state: Any, prototypes: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return prototypes and the state of the sampler.

    Raises:
        ValueError: If the state is damaged, or differs in the prompts, the number of classes or the width.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
        raise ValueError("SkipCLIP: the extra state must be the uint8 tensor of get_extra_state().")
    try:
        tensors = safetensors.torch.load(state.cpu().numpy().tobytes())
        loaded, prompts = tensors.pop("prototypes"), tensors.pop("prompts", None)
    except (safetensors.SafetensorError, KeyError) as error:
        raise ValueError(f"SkipCLIP: the extra state is damaged: {error}.") from error
    if loaded.shape != prototypes.shape:
        raise ValueError(
            f"SkipCLIP: the extra state has prototypes {list(loaded.shape)}, and this model and task have "
            f"{list(prototypes.shape)}. Load it into a SkipCLIP with the same prompts."
        )
    if prompts is not None and not prompts.equal(_digest(tokens)):
        raise ValueError(
            "SkipCLIP: the extra state has the prototypes of other prompts, or of these in another order. Load "
            "it into a SkipCLIP with the same prompts, or load the weights alone into clip.model."
        )
    return loaded, tensors


def _digest(tokens: Tensor) -> Tensor:
    return torch.frombuffer(bytearray(digest_tensors([("tokens", tokens)]), "ascii"), dtype=torch.uint8)
