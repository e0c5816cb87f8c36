"""Gradients of a LayerNorm and the projection behind it, from that of the projection of the normalised rows x̂.

With y = (x̂ ∘ γ + β) Wᵀ + b and the gradient G = d_yᵀ x̂, [O, W], which one product computes,

    d_W = G ∘ γ + d_b ⊗ β,   d_γ = Σ_o W_o ∘ G_o,   d_β = Σ_o d_b_o · W_o

so that no gradient of the norm's result is needed. The sums over rows are partial: `column_sums` completes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import registration
from .launching import launch, tl, triton

BLOCK_O = 8  # rows per iteration
ROWS = 64  # rows per program
BLOCK_W = 128  # columns per program


@triton.jit
def _folded_norm_gradients_kernel(
    weight_ptr,
    unit_gradient_ptr,
    d_bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    d_weight_ptr,
    sums_ptr,
    O,
    W,
    stride_weight_o,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """d_W = G ∘ γ + d_b ⊗ β, and partial sums of d_γ and d_β. One program: ROWS rows, BLOCK_W columns."""
    block = tl.program_id(0)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    norm_weight = tl.load(norm_weight_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)  # [BLOCK_W]
    norm_bias = tl.load(norm_bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)  # [BLOCK_W]
    d_norm_weight = tl.zeros([BLOCK_O, BLOCK_W], tl.float32)
    d_norm_bias = tl.zeros([BLOCK_O, BLOCK_W], tl.float32)
    for start in range(0, ROWS, BLOCK_O):
        offs_o = (block * ROWS + start + tl.arange(0, BLOCK_O)).to(tl.int64)
        mask = (offs_o < O)[:, None] & mask_w[None, :]
        # 1. Rows of W and G, [BLOCK_O, BLOCK_W], and of d_b, [BLOCK_O]
        weight = tl.load(weight_ptr + offs_o[:, None] * stride_weight_o + offs_w[None, :], mask=mask, other=0.0)
        offs = offs_o[:, None] * W + offs_w[None, :]
        unit_gradient = tl.load(unit_gradient_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        d_bias = tl.load(d_bias_ptr + offs_o, mask=offs_o < O, other=0.0).to(tl.float32)
        # 2. Terms of the sums, and the gradient of W
        d_norm_weight += weight.to(tl.float32) * unit_gradient  # [BLOCK_O, BLOCK_W]
        d_norm_bias += weight.to(tl.float32) * d_bias[:, None]  # [BLOCK_O, BLOCK_W]
        d_weight = unit_gradient * norm_weight[None, :] + d_bias[:, None] * norm_bias[None, :]
        tl.store(d_weight_ptr + offs, d_weight, mask=mask)  # [BLOCK_O, BLOCK_W]
    # 3. Sums of this block of rows, side by side
    row_ptr = sums_ptr + block * 2 * W + offs_w
    tl.store(row_ptr, tl.sum(d_norm_weight, axis=0), mask=mask_w)  # [BLOCK_W]
    tl.store(row_ptr + W, tl.sum(d_norm_bias, axis=0), mask=mask_w)  # [BLOCK_W]


def _launch(
    weight: Tensor, unit_gradient: Tensor, d_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor]:
    (O, W), device = weight.shape, weight.device
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    d_weight, sums = _fake(weight, unit_gradient, d_bias, norm_weight, norm_bias)
    launch(
        _folded_norm_gradients_kernel,
        (len(sums), triton.cdiv(W, BLOCK_W)),
        device=device,
        num_warps=4,
        weight_ptr=weight,
        unit_gradient_ptr=unit_gradient.contiguous(),
        d_bias_ptr=d_bias.contiguous(),
        norm_weight_ptr=norm_weight.contiguous(),
        norm_bias_ptr=norm_bias.contiguous(),
        d_weight_ptr=d_weight,
        sums_ptr=sums,
        O=O,
        W=W,
        stride_weight_o=weight.stride(0),
        ROWS=ROWS,
        BLOCK_O=BLOCK_O,
        BLOCK_W=BLOCK_W,
    )
    return d_weight, sums


def _fallback(
    weight: Tensor, unit_gradient: Tensor, d_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor]:
    given = unit_gradient, d_bias, norm_weight, norm_bias
    unit_gradient, d_bias, norm_weight, norm_bias = map(reference.at_least_fp32, given)
    d_weight, sums = _fake(weight, unit_gradient, d_bias, norm_weight, norm_bias)
    torch.addcmul(d_bias[:, None] * norm_bias, unit_gradient, norm_weight, out=d_weight)
    whole = torch.cat([(weight * unit_gradient).sum(dim=0), d_bias @ weight.to(d_bias.dtype)])  # [2W]
    return d_weight, torch.cat([whole[None], torch.zeros_like(sums[1:])])


def _fake(
    weight: Tensor, unit_gradient: Tensor, d_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor]:
    O, W = weight.shape
    wide = unit_gradient.new_empty(0, dtype=torch.promote_types(unit_gradient.dtype, torch.float32))
    return wide.new_empty(O, W), wide.new_empty(-(-O // ROWS), 2 * W)


folded_norm_gradients = registration.define(
    "folded_norm_gradients(Tensor weight, Tensor unit_gradient, Tensor d_bias, Tensor norm_weight, Tensor norm_bias)"
    " -> (Tensor d_weight, Tensor sums)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
)
registration.not_differentiable(folded_norm_gradients)
