"""`add_layer_norm`: residual addition and LayerNorm of the sum.

    hidden = x + residual, rounded to the dtype of x;   x̂ = (hidden − mean) · rstd;   normed = x̂ · weight + bias
    g = d_normed · weight
    d_x = d_residual = d_hidden + rstd · (g − mean(g) − x̂ · mean(g · x̂))
    d_weight = Σ d_normed · x̂,   d_bias = Σ d_normed   over all rows

Without a residual hidden is x itself. An operator must not return one of its inputs: `hidden` is then empty, and the
public function returns x.

Forward also returns the mean and rstd of each row, in fp32 (fp64 for fp64). Saved for backward: hidden, which the model
saves anyway, these two numbers per row, and the weight. Gradients that are not needed are empty.

On a GPU backward is two kernels: the first sums fixed blocks of rows, the second adds these sums in order. Reference:
`reference.add_layer_norm`. CPU kernel: csrc/add_layer_norm.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import registration
from .launching import launch, tl, triton
from .row_sums import sum_in_order

TILE = 1024  # numbers in a tile: one row, or as many rows as fit
ROWS_PER_SUM = 8  # least number of rows per program of backward; with fewer it would write more than it reads
MAX_SUMS = 512  # largest number of programs of backward: enough for every GPU, few sums for the second kernel
BLOCK_SUMS = 64  # partial sums per iteration of the second kernel
BLOCK_COLUMNS = 32  # columns per program of the second kernel: 128 bytes


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    hidden_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    eps,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """hidden = x + residual, normed = (hidden − mean) · rstd · weight + bias. One program: BLOCK_R whole rows."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_w = tl.arange(0, BLOCK_W)
    mask_r, mask_w = offs_r < R, offs_w < W
    offs, mask = offs_r[:, None] * W + offs_w[None, :], mask_r[:, None] & mask_w[None, :]
    hidden = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
    if residual_ptr is not None:
        hidden += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        rounded = hidden.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + offs, rounded, mask=mask)
        hidden = rounded.to(tl.float32)
    mean = tl.sum(hidden, axis=1) / W  # [BLOCK_R]
    centred = tl.where(mask_w[None, :], hidden - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / W + eps
    rstd = tl.sqrt(variance) / variance  # NaN where the variance overflows, not 0
    weight = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_r, mean, mask=mask_r)
    tl.store(rstd_ptr + offs_r, rstd, mask=mask_r)


@triton.jit
def _add_layer_norm_bwd_rows_kernel(
    d_normed_ptr,
    d_hidden_ptr,
    hidden_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    d_x_ptr,
    d_weight_sums_ptr,
    d_bias_sums_ptr,
    R,
    rows,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """d_x = d_hidden + rstd · (g − mean(g) − x̂ · mean(g · x̂)), and Σ d_normed · x̂ and Σ d_normed over some rows.

    One program: `rows` rows, BLOCK_R at a time, and its own row of both sums [P, W]. The pointer of a gradient that is
    absent or not needed is None.
    """
    program = tl.program_id(0).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    weight = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    d_bias = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for start in range(0, rows, BLOCK_R):
        offs_r = program * rows + start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        offs, mask = offs_r[:, None] * W + offs_w[None, :], mask_r[:, None] & mask_w[None, :]
        d_normed = tl.load(d_normed_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
        hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
        rstd = tl.load(rstd_ptr + offs_r, mask=mask_r, other=0.0)
        unit = (hidden - mean[:, None]) * rstd[:, None]
        if d_x_ptr is not None:
            g = d_normed * weight[None, :]  # 0 beyond W
            mean_g, mean_gx = tl.sum(g, axis=1) / W, tl.sum(g * unit, axis=1) / W
            d_row = (g - mean_g[:, None] - unit * mean_gx[:, None]) * rstd[:, None]
            if d_hidden_ptr is not None:
                d_row += tl.load(d_hidden_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            tl.store(d_x_ptr + offs, d_row.to(d_x_ptr.dtype.element_ty), mask=mask)
        d_weight += d_normed * unit
        d_bias += d_normed
    if d_weight_sums_ptr is not None:
        tl.store(d_weight_sums_ptr + program * W + offs_w, tl.sum(d_weight, axis=0), mask=mask_w)
    if d_bias_sums_ptr is not None:
        tl.store(d_bias_sums_ptr + program * W + offs_w, tl.sum(d_bias, axis=0), mask=mask_w)


@triton.jit
def _add_layer_norm_bwd_sums_kernel(
    d_weight_sums_ptr,
    d_bias_sums_ptr,
    d_weight_ptr,
    d_bias_ptr,
    P,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """d_weight = Σ_p d_weight_sums, and the same for d_bias. One program: BLOCK_W columns of both."""
    offs_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    if d_weight_ptr is not None:
        d_weight = sum_in_order(d_weight_sums_ptr, P, offs_w, W, BLOCK_P, BLOCK_W)
        tl.store(d_weight_ptr + offs_w, d_weight.to(d_weight_ptr.dtype.element_ty), mask=offs_w < W)
    if d_bias_ptr is not None:
        d_bias = sum_in_order(d_bias_sums_ptr, P, offs_w, W, BLOCK_P, BLOCK_W)
        tl.store(d_bias_ptr + offs_w, d_bias.to(d_bias_ptr.dtype.element_ty), mask=offs_w < W)


def _tile(W: int) -> dict[str, Any]:
    BLOCK_W = triton.next_power_of_2(W)
    BLOCK_R = max(1, TILE // BLOCK_W)
    return {"BLOCK_W": BLOCK_W, "BLOCK_R": BLOCK_R, "num_warps": min(max(BLOCK_R * BLOCK_W // 256, 4), 16)}


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W, device = x.shape[-1], x.device
    hidden = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=device)
    normed = torch.empty(x.shape, dtype=x.dtype, device=device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=device) for _ in range(2))
    R, tile = mean.numel(), _tile(W)
    launch(
        _add_layer_norm_fwd_kernel,
        (triton.cdiv(R, tile["BLOCK_R"]),),
        device=device,
        x_ptr=x.contiguous(),
        residual_ptr=None if residual is None else residual.contiguous(),
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        hidden_ptr=None if residual is None else hidden,
        normed_ptr=normed,
        mean_ptr=mean,
        rstd_ptr=rstd,
        R=R,
        eps=eps,
        W=W,
        **tile,
    )
    return hidden, normed, mean, rstd


def _launch_backward(
    d_normed: Tensor,
    d_hidden: Tensor | None,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    W, R, device = hidden.shape[-1], mean.numel(), hidden.device
    tile = _tile(W)
    blocks = triton.cdiv(R, tile["BLOCK_R"])
    blocks_per_sum = max(triton.cdiv(ROWS_PER_SUM, tile["BLOCK_R"]), triton.cdiv(blocks, MAX_SUMS))
    P = max(1, triton.cdiv(blocks, blocks_per_sum))  # without rows the sums are 0

    def sums(need: bool) -> Tensor | None:
        return torch.empty(P, W, dtype=torch.float32, device=device) if need else None

    needs = need_x, need_weight, need_bias
    d_x, d_weight, d_bias = registration.gradients_like((hidden, weight, weight), needs)
    d_weight_sums, d_bias_sums = sums(need_weight), sums(need_bias)
    launch(
        _add_layer_norm_bwd_rows_kernel,
        (P,),
        device=device,
        d_normed_ptr=d_normed.contiguous(),
        d_hidden_ptr=None if d_hidden is None else d_hidden.contiguous(),
        hidden_ptr=hidden.contiguous(),
        mean_ptr=mean.contiguous(),
        rstd_ptr=rstd.contiguous(),
        weight_ptr=weight.contiguous(),
        d_x_ptr=d_x if need_x else None,
        d_weight_sums_ptr=d_weight_sums,
        d_bias_sums_ptr=d_bias_sums,
        R=R,
        rows=blocks_per_sum * tile["BLOCK_R"],
        W=W,
        **tile,
    )
    if need_weight or need_bias:
        launch(
            _add_layer_norm_bwd_sums_kernel,
            (triton.cdiv(W, BLOCK_COLUMNS),),
            device=device,
            num_warps=4,
            d_weight_sums_ptr=d_weight_sums,
            d_bias_sums_ptr=d_bias_sums,
            d_weight_ptr=d_weight if need_weight else None,
            d_bias_ptr=d_bias if need_bias else None,
            P=P,
            W=W,
            BLOCK_P=BLOCK_SUMS,
            BLOCK_W=BLOCK_COLUMNS,
        )
    return d_x, d_weight, d_bias


def _fallback(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = (x if residual is None else x + residual).contiguous()
    hidden_fp32 = reference.at_least_fp32(hidden)
    mean = hidden_fp32.mean(dim=-1)
    centred = hidden_fp32 - mean[..., None]
    variance = centred.square().mean(dim=-1) + eps
    rstd = variance.sqrt() / variance  # NaN where the variance overflows, not 0
    normed = centred * rstd[..., None] * weight.to(mean.dtype) + bias.to(mean.dtype)
    return x.new_empty(0) if residual is None else hidden, normed.to(x.dtype), mean, rstd


def _fallback_backward(
    d_normed: Tensor,
    d_hidden: Tensor | None,
    hidden: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # Not autograd of the reference: backward receives the statistics instead of eps.
    dtype = mean.dtype
    hidden_fp32, upstream = (x.contiguous().to(dtype) for x in (hidden, d_normed))
    d_x, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        upstream,
        hidden_fp32,
        hidden.shape[-1:],
        mean[..., None],
        rstd[..., None],
        weight.to(dtype),
        torch.zeros_like(weight, dtype=dtype),
        (need_x, need_weight, need_bias),
    )
    if d_x is None:
        d_x = hidden.new_empty(0)
    elif d_hidden is not None:
        d_x = d_x + d_hidden
    d_weight, d_bias = (weight.new_empty(0) if x is None else x for x in (d_weight, d_bias))
    return d_x.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=dtype) for _ in range(2))
    return x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape), mean, rstd


def _fake_backward(
    d_normed: Tensor, d_hidden: Tensor | None, hidden: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *needs: bool
) -> tuple[Tensor, ...]:
    return registration.gradients_like((hidden, weight, weight), needs)


add_layer_norm = registration.define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor hidden, Tensor normed, Tensor mean, Tensor rstd)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
)
add_layer_norm_backward = registration.define(
    "add_layer_norm_backward(Tensor d_normed, Tensor? d_hidden, Tensor hidden, Tensor mean, Tensor rstd, Tensor weight,"
    " bool need_x, bool need_weight, bool need_bias) -> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    fallback=_fallback_backward,
    fake=_fake_backward,
    launch=_launch_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, _ = inputs
    hidden, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd, *([hidden] if residual is None else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else hidden, mean, rstd, weight)


def _backward(ctx: Any, d_hidden: Tensor | None, d_normed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
    if d_normed is None:
        return d_hidden, d_hidden
    needs = need_x or need_residual, need_weight, need_bias
    d_x, d_weight, d_bias = add_layer_norm_backward(d_normed, d_hidden, *ctx.saved_tensors, *needs)
    return d_x, d_x, d_weight, d_bias


registration.differentiate(add_layer_norm, _backward, _save)
registration.refuse_double_backward(add_layer_norm_backward, instead="skipkernels.reference.add_layer_norm")
registration.autocast_features(add_layer_norm, features=2)
