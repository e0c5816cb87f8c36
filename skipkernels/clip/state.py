"""State of SkipCLIP in a checkpoint beside the weights, as one uint8 tensor: the sampler and the prototypes.

The tensor is a safetensors file, since trainers save state dicts in that format, which takes tensors alone. A state of
several processes has no prototypes: each process computes those of its classes when SkipCLIP is created.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..checks import warn_caller
from .checks import described


class Origin(NamedTuple):
    """Prompts, model and processes of a state; a SkipCLIP of another origin refuses it."""

    prompts: str  # digest of the prompts of all classes
    width: int  # D
    processes: int


def pack_state(origin: Origin, prototypes: Tensor, sampler: dict[str, Tensor]) -> Tensor:
    """Pack the origin, prototypes [C, D] and the state of the sampler into uint8 [bytes]."""
    tensors = {"origin": torch.frombuffer(bytearray(json.dumps(origin), "ascii"), dtype=torch.uint8), **sampler}
    if origin.processes == 1:
        tensors["prototypes"] = prototypes.cpu()
    return torch.frombuffer(bytearray(safetensors.torch.save(tensors)), dtype=torch.uint8)


def unpack_state(state: Any, origin: Origin) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the prototypes, None of several processes, and the state of the sampler; raise for another origin."""
    if not isinstance(state, Tensor) or state.dtype != torch.uint8:
        raise ValueError(
            f"SkipCLIP: the extra state must be the uint8 tensor of get_extra_state(); got {described(state)}. To "
            "average or convert weights, take clip.model.state_dict()."
        )
    try:
        tensors = safetensors.torch.load(state.cpu().numpy().tobytes())
        saved = Origin(*json.loads(bytes(tensors.pop("origin").tolist())))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"SkipCLIP: the extra state is damaged: {error}.") from error
    if saved != origin:
        differing = [name for name, a, b in zip(Origin._fields, saved, origin, strict=True) if a != b]
        raise ValueError(
            f"SkipCLIP: the extra state is of other {' and '.join(differing)}; got {saved}, expected {origin}. Load it "
            "into a SkipCLIP with the same prompts in this order, the same model and as many processes, or load the "
            "weights alone into clip.model."
        )
    return tensors.pop("prototypes", None), tensors


def forgive_missing_state(key: str, missing: list[str]) -> None:
    """Remove the key of the extra state from the missing ones of a state dict, with a warning."""
    if key in missing:
        missing.remove(key)
        warn_caller(
            "SkipCLIP: the state dict has no sampler and no prototypes, so it has weights alone; both stay as they are."
        )
