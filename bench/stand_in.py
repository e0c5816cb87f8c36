"""A SkipCLIP on the meta device, which stands in for a GPU (meta_device.py); steps without products."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import skipkernels as sk

_aten = torch.ops.aten
PRODUCTS = {product.default for product in (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)}


def move_to_meta(clip: sk.SkipCLIP) -> None:
    """Move a SkipCLIP, after a step: text features at the cut need values and are cached."""
    clip.to("meta")


class WithoutProducts(TorchDispatchMode):
    """Replace matrix products by zeros."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in PRODUCTS:
            left, right = args[-2:]
            return left.new_zeros(*left.shape[:-1], right.shape[-1])
        return operator(*args, **kwargs or {})
