"""The same values in other memory layouts, which an operator must read with strides or copy."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("transposed", "every other column", "every other row", "unaligned", "expanded")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return a matrix in one of LAYOUTS, with NaN in the gaps; a vector always with gaps."""
    if x.dim() == 1:
        return torch.stack([x, x * torch.nan], dim=1).flatten()[::2]
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "every other column":
        return torch.stack([x, x * torch.nan], dim=2).flatten(1)[:, ::2]
    if layout == "every other row":
        return torch.stack([x, x * torch.nan], dim=1).flatten(0, 1)[::2]
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x[:1].expand(x.shape)
