"""The same values in other memory layouts, which an operator must read with strides or copy."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("transposed", "every other column", "every other row", "wider rows", "unaligned", "expanded")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return a tensor in one of LAYOUTS, with NaN (integers: 1) in the gaps; a vector with gaps, a scalar as it is."""
    gap = torch.full_like(x, torch.nan if x.is_floating_point() else 1)
    if x.dim() == 0:
        return x
    if x.dim() == 1:
        return torch.stack([x, gap], dim=1).flatten()[::2]
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "every other column":
        return torch.stack([x, gap], dim=-1).flatten(-2)[..., ::2]
    if layout == "every other row":
        return torch.stack([x, gap], dim=1).flatten(0, 1)[::2]
    if layout == "wider rows":
        return torch.cat([gap, x, gap], dim=-1)[..., x.shape[-1] : -x.shape[-1]]
    if layout == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x[:1].expand(x.shape)
