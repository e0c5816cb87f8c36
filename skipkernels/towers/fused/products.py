"""Products of matrices in a wider dtype, where a device can write it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.launching import products_widen


def _product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` if the device can write a product of tensors like `x` in it by one launch, else that of `x`."""
    is_16_bit = x.dtype in (torch.bfloat16, torch.float16)
    return dtype if is_16_bit and dtype == torch.float32 and products_widen(x.device.type) else x.dtype


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left · right in a dtype of `_product_dtype`."""
    if dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=dtype, out=out)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left · right, in `dtype` if the device can write it without another launch, else in the dtype of both."""
    return _multiply(left, right, _product_dtype(left, dtype))


def joint_product(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """d_outᵀ · inputs of pairs [R, out], [R, in], one below the other, [sum of out, in]; dtype as in `product`."""
    if len(pairs) == 1:
        ((d_out, inputs),) = pairs
        return product(d_out.T, inputs, dtype)
    heights, inputs = [d_out.shape[1] for d_out, _ in pairs], pairs[0][1]
    dtype = _product_dtype(inputs, dtype)
    joint = inputs.new_empty(sum(heights), inputs.shape[1], dtype=dtype)
    for (d_out, inputs), out in zip(pairs, joint.split(heights), strict=True):
        _multiply(d_out.T, inputs, dtype, out)
    return joint
