"""Extra state of SkipCLIP in a state dict: a uint8 tensor with the bytes of a safetensors file."""

from __future__ import annotations

from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from ..digests import digest_tensors
from .settings import prompts_of

_FORMAT = "1"
# Largest distance of prototypes of the same weights that other numbers of processes computed: as between SkipCLIP and
# the model, see towers/agreement.py; in half precision, prompts cropped to another length are rounded elsewhere.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}


class Shard(NamedTuple):
    """The classes c ≡ rank (mod size) of `num_classes`."""

    rank: int
    size: int
    num_classes: int

    @property
    def class_ids(self) -> Tensor:
        """The classes, int64, ascending."""
        return torch.arange(self.rank, self.num_classes, self.size)


def pack_state(prototypes: Tensor, prompts: str, sampler: dict[str, Tensor], shard: Shard) -> Tensor:
    """Pack prototypes [n, D] of a shard, a digest of all prompts, and the state of the sampler into uint8 [bytes]."""
    tensors = {
        "prototypes": prototypes.cpu(),
        "prompts": torch.frombuffer(bytearray(prompts, "ascii"), dtype=torch.uint8),
    }
    if shard.size > 1:
        tensors["shard"] = torch.tensor(shard)
    data = safetensors.torch.save(tensors | sampler, metadata={"format": _FORMAT})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def unpack_state(
    state: Any, prototypes: Tensor, prompts: str, shard: Shard, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the prototypes [n, D] of a shard, and the state of the sampler.

    A state of another shard replaces the prototypes of the classes that both shards have; the other rows stay.
    """
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.ndim != 1:
        raise ValueError("SkipCLIP: the extra state must be the uint8 tensor of get_extra_state().")
    try:
        tensors = safetensors.torch.load(state.cpu().numpy().tobytes())
        loaded, saved_prompts = tensors.pop("prototypes"), tensors.pop("prompts", None)
        saved = Shard(*tensors.pop("shard", torch.tensor([0, 1, len(loaded)])).tolist())
    except (safetensors.SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"SkipCLIP: the extra state is damaged: {error}.") from error
    if not (0 <= saved.rank < saved.size and len(loaded) == len(saved.class_ids)):
        raise ValueError(f"SkipCLIP: the extra state is damaged: {len(loaded)} prototypes of {saved}.")
    here = [shard.num_classes, prototypes.shape[1]]
    there = [saved.num_classes, *loaded.shape[1:]]
    if there != here:
        raise ValueError(
            f"SkipCLIP: the extra state has prototypes {there}, and this model and task have {here}. Load it into a "
            "SkipCLIP with the same prompts."
        )
    if saved_prompts is not None and bytes(saved_prompts.tolist()) != prompts.encode():
        raise ValueError(
            "SkipCLIP: the extra state has the prototypes of other prompts, or of these in another order. Load "
            "it into a SkipCLIP with the same prompts, or load the weights alone into clip.model."
        )
    if saved == shard == Shard(0, 1, len(loaded)):
        return loaded, tensors
    class_ids = saved.class_ids[saved.class_ids % shard.size == shard.rank]
    found = loaded[class_ids // saved.size].to(prototypes)
    rows = (class_ids // shard.size).to(prototypes.device)
    distance = (found - prototypes[rows]).norm(dim=1)
    if saved.size > 1 and (distance > _TOLERANCE[dtype]).any():
        raise ValueError(
            "SkipCLIP: the extra state of one of several processes has prototypes of other weights than these, up to "
            f"{distance.max().item():.1e} away. Such a state lacks the other classes: create SkipCLIP on the weights "
            "from before tuning, then load the state."
        )
    return prototypes.index_copy(0, rows, found), tensors


def prompts_digest(tokens: Tensor) -> str:
    """Digest of the prompts [C, L] or [C, T, L] of all classes."""
    return digest_tensors([("tokens", prompts_of(tokens))])


def refuse_low_rank_updates(model: nn.Module, state_dict: Any, prefix: str) -> None:
    """Raise a ValueError if a state dict has the low-rank updates of `add_lora`, and the model has none."""
    saved = [name for name in state_dict if name.startswith(prefix) and name.endswith(".lora_A")]
    if saved and not any(name.endswith(".lora_A") for name, _ in model.named_parameters()):
        rank = state_dict[saved[0]].shape[-2]
        raise ValueError(
            f"SkipCLIP.load_state_dict: the state has low-rank updates of rank {rank}, and the model has none. Call "
            f"add_lora(clip, rank={rank}) first, with the targets and alpha of the saved model."
        )
