"""Low-rank update of a weight, W + s · B · A, as a parametrization of the caller's module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..dtypes import wide_dtype, without_autocast


class LowRankUpdate(nn.Module):
    """Add alpha / rank · B · A to the parts `updated` of a weight of `parts` parts with equal numbers of rows.

    A is uniform in ±1/√in, as in PEFT (`kaiming_uniform_` with a = √5), and B is zero. Both have at least fp32; the sum
    is computed in their dtype, without autocast, and rounded to that of the weight.
    """

    def __init__(
        self, weight: Tensor, parts: int, updated: Sequence[int], rank: int, alpha: float, generator: torch.Generator
    ):
        super().__init__()
        self.parts, self.updated, self.rank, self.alpha = parts, tuple(updated), rank, alpha
        rows, columns = weight.shape
        dtype = wide_dtype(weight.dtype)
        down = torch.empty(len(updated), rank, columns, device=generator.device)
        nn.init.uniform_(down, -(columns**-0.5), columns**-0.5, generator=generator)
        self.lora_A = nn.Parameter(down.to(weight.device, dtype))  # [n, rank, in] for n updated parts
        self.lora_B = nn.Parameter(self.lora_A.detach().new_zeros(len(updated), rows // parts, rank))  # [n, out, rank]

    def forward(self, weight: Tensor) -> Tensor:
        """Return the updated weight."""
        scale, wide = self.alpha / self.rank, torch.promote_types(weight.dtype, self.lora_A.dtype)
        parts = list(weight.chunk(self.parts))
        with without_autocast(weight.device):
            for part, down, up in zip(self.updated, self.lora_A.to(wide), self.lora_B.to(wide), strict=True):
                parts[part] = torch.addmm(parts[part].to(wide), up, down, alpha=scale).to(weight.dtype)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def get_extra_state(self) -> Tensor:
        """Return alpha and the updated parts, fp64."""
        return torch.tensor([self.alpha, *self.updated], dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Raise a ValueError if the state dict is of another alpha or other parts: A and B are then another update."""
        if not state.equal(own := self.get_extra_state().to(state)):
            (alpha, *parts), (own_alpha, *own_parts) = state.tolist(), own.tolist()
            raise ValueError(
                f"load_state_dict: the low-rank updates have alpha {alpha:g} and are of the parts {parts} of a weight, "
                f"those of this model have {own_alpha:g} and are of {own_parts}. Add them with the same targets and "
                "alpha: add_lora(clip, rank, targets, alpha=…)."
            )


def low_rank_updates(module: nn.Module) -> dict[str, LowRankUpdate]:
    """Low-rank updates of a module by the name of the weight; empty if a weight has another parametrization."""
    if not parametrize.is_parametrized(module):
        return {}
    found: dict[str, LowRankUpdate] = {}
    parametrizations: Any = module.parametrizations
    for name, applied in parametrizations.items():
        if len(applied) != 1 or type(applied[0]) is not LowRankUpdate:
            return {}
        found[name] = applied[0]
    return found
