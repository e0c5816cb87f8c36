"""`add_layer_norm`: residual addition and LayerNorm or RMSNorm of the sum.

    hidden = x + residual, rounded to the dtype of x;   x̂ = (hidden − mean) · rstd;   normed = x̂ · weight + bias
    g = d_normed · weight
    d_x = d_residual = d_hidden + rstd · (g − mean(g) − x̂ · mean(g · x̂))
    d_weight = Σ d_normed · x̂,   d_bias = Σ d_normed   over all rows

With `rms`, an RMSNorm: mean = 0 and mean(g) = 0; the result `mean` is empty, and backward does not read it.

x, residual and normed may have different dtypes. Without a residual `hidden` is empty: an operator must not return one
of its inputs. Saved for backward: hidden, the weight, and mean and rstd of each row, in fp32 (fp64 for fp64).

On a GPU one kernel of backward sums fixed blocks of rows, and a second adds these partial sums in order.

Autograd asks backward for the gradients alone. A fused block (`norm_backward` in towers/fused/stages.py) has options
for what else it needs of the same rows, so that they are read once:

    option       result                           use in the block
    need_sums    d_hidden_sum, d_x_sum            gradients of the biases of the MLP's and the attention's output
    partial      partial_sums, on a GPU in place  `column_sums` adds those of several operators in one launch
                 of all sums over the rows
    cast         d_x_cast, d_x in another dtype   gradient in 16 bits for the next product, under autocast
    need_normed  normed, recomputed               gradient of the weight that it is multiplied by

For example, the second norm of a block, under autocast:

    Backward(d_normed, d_hidden, hidden, mean, rstd, weight, bias, need_x=True, need_weight=True, need_bias=True,
             need_sums=True, cast=torch.bfloat16, need_normed=True)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dtypes
from . import autograd, launching, registration
from .launching import contiguous_or_none, launch, launch_options, tl, triton
from .row_sums import blocks_of_rows, write_column_sums

MAX_WIDTH = 4096  # a tile has whole rows, and backward of wider ones spills registers: they use the fallback
ROWS_PER_SUM = 8  # minimum rows per program of backward: it writes up to four rows of partial sums
MAX_SUMS = 512  # maximum programs of backward: enough to fill a GPU, and few partial sums for the second kernel


class Forward(NamedTuple):
    """Arguments of the operator; its schema is made from them."""

    x: Tensor  # [..., W]
    residual: Tensor | None  # [..., W]
    weight: Tensor  # [W]
    bias: Tensor | None  # [W]
    eps: float
    dtype: torch.dtype | None  # of normed; None: that of x
    rms: bool = False  # RMSNorm


class Backward(NamedTuple):
    """Arguments of the backward operator; its schema is made from them."""

    d_normed: Tensor  # [..., W]
    d_hidden: Tensor | None  # [..., W]
    hidden: Tensor  # [..., W]
    mean: Tensor  # [...], for RMSNorm [0]
    rstd: Tensor  # [...]
    weight: Tensor  # [W]
    bias: Tensor | None  # [W], only read with need_normed
    need_x: bool
    need_weight: bool
    need_bias: bool
    # For fused blocks, see above
    need_sums: bool = False  # with d_hidden and need_x
    partial: bool = False
    cast: torch.dtype | None = None  # with need_x
    need_normed: bool = False
    rms: bool = False  # RMSNorm


class BackwardResults(NamedTuple):
    """Results of the backward operator; empty if not needed."""

    d_x: Tensor  # [..., W], dtype of hidden
    d_weight: Tensor  # [W], dtype of the weight
    d_bias: Tensor  # [W], dtype of the weight
    d_x_cast: Tensor  # [..., W], d_x in the dtype `cast`, rounded once
    normed: Tensor  # [..., W], dtype of d_normed
    d_hidden_sum: Tensor  # [W], dtype of the weight, Σ d_hidden over all rows
    d_x_sum: Tensor  # [W], dtype of the weight, Σ d_x over all rows
    # With `partial` on a GPU, fp32 [P, 2W] or [P, 4W]: partial sums of d_weight and d_bias, with `need_sums` also of
    # d_hidden_sum and d_x_sum, side by side in this order. These are then empty.
    partial_sums: Tensor


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
    """hidden = x + residual, normed = (hidden − mean) · rstd · weight + bias. One program: BLOCK_R whole rows.

    Without mean_ptr the mean is 0.
    """
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_w = tl.arange(0, BLOCK_W)
    mask_r, mask_w = offs_r < R, offs_w < W
    offs, mask = offs_r[:, None] * W + offs_w[None, :], mask_r[:, None] & mask_w[None, :]
    # 1. hidden = x + residual, rounded as it is stored
    hidden = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
    if residual_ptr is not None:
        hidden += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
        rounded = hidden.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + offs, rounded, mask=mask)  # [BLOCK_R, BLOCK_W]
        hidden = rounded.to(tl.float32)
    # 2. Mean and rstd of each row
    mean = tl.zeros([BLOCK_R], tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(hidden, axis=1) / W  # [BLOCK_R]
    centred = tl.where(mask_w[None, :], hidden - mean[:, None], 0.0)  # [BLOCK_R, BLOCK_W]
    variance = tl.sum(centred * centred, axis=1) / W + eps  # [BLOCK_R]
    # As in PyTorch, but NaN, not 0, if the variance overflows.
    rstd = tl.where(variance < float("inf"), 1 / tl.sqrt(variance), float("nan"))  # [BLOCK_R]
    # 3. normed = x̂ · weight + bias
    weight = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)  # [BLOCK_W]
    normed = centred * rstd[:, None] * weight[None, :]  # [BLOCK_R, BLOCK_W]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_W]
    tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_W]
    if mean_ptr is not None:
        tl.store(mean_ptr + offs_r, mean, mask=mask_r)  # [BLOCK_R]
    tl.store(rstd_ptr + offs_r, rstd, mask=mask_r)  # [BLOCK_R]


@triton.jit
def _add_layer_norm_bwd_rows_kernel(
    d_normed_ptr,
    d_hidden_ptr,
    hidden_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    d_x_ptr,
    d_x_cast_ptr,
    normed_ptr,
    sums_ptr,
    R,
    rows,
    W: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """d_x = d_hidden + rstd · (g − mean(g) − x̂ · mean(g · x̂)); Σ d_normed · x̂, Σ d_normed, Σ d_hidden, Σ d_x.

    One program: `rows` rows, BLOCK_R at a time, and its own row of the partial sums [P, SUMS, W]. SUMS is 0, 2 (the
    first two) or 4. The pointer of a tensor that is absent or not needed is None.
    """
    program = tl.program_id(0).to(tl.int64)
    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    weight = tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)  # [BLOCK_W]
    # Sums over the rows of this program, reduced over BLOCK_R after the loop
    d_weight = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    d_bias = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    d_hidden_sum = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    d_x_sum = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for start in range(0, rows, BLOCK_R):
        offs_r = program * rows + start + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        offs, mask = offs_r[:, None] * W + offs_w[None, :], mask_r[:, None] & mask_w[None, :]
        # 1. x̂ from the saved mean and rstd
        d_normed = tl.load(d_normed_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
        hidden = tl.load(hidden_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
        mean = tl.zeros([BLOCK_R], tl.float32)
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R]
        rstd = tl.load(rstd_ptr + offs_r, mask=mask_r, other=0.0)  # [BLOCK_R], 0 beyond R: adds 0 to every sum
        unit = (hidden - mean[:, None]) * rstd[:, None]  # [BLOCK_R, BLOCK_W], x̂
        # 2. normed, recomputed
        if normed_ptr is not None:
            bias = tl.zeros([BLOCK_W], tl.float32)
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)  # [BLOCK_W]
            normed = unit * weight[None, :] + bias[None, :]  # [BLOCK_R, BLOCK_W]
            tl.store(normed_ptr + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_W]
        # 3. d_x
        if d_x_ptr is not None:
            g = d_normed * weight[None, :]  # [BLOCK_R, BLOCK_W], 0 beyond W
            mean_g = tl.zeros([BLOCK_R], tl.float32)
            if mean_ptr is not None:
                mean_g = tl.sum(g, axis=1) / W  # [BLOCK_R]
            mean_gx = tl.sum(g * unit, axis=1) / W  # [BLOCK_R]
            d_x = (g - mean_g[:, None] - unit * mean_gx[:, None]) * rstd[:, None]  # [BLOCK_R, BLOCK_W]
            if d_hidden_ptr is not None:
                d_hidden = tl.load(d_hidden_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
                d_x += d_hidden
                if SUMS == 4:
                    d_hidden_sum += d_hidden
            tl.store(d_x_ptr + offs, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_W]
            if d_x_cast_ptr is not None:
                tl.store(d_x_cast_ptr + offs, d_x.to(d_x_cast_ptr.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_W]
            if SUMS == 4:
                d_x_sum += d_x
        # 4. Sums
        d_weight += d_normed * unit
        d_bias += d_normed
    # 5. This program's row of the sums [P, SUMS, W]
    offs = program * SUMS * W + offs_w
    if SUMS > 0:
        tl.store(sums_ptr + offs, tl.sum(d_weight, axis=0), mask=mask_w)  # [BLOCK_W]
        tl.store(sums_ptr + W + offs, tl.sum(d_bias, axis=0), mask=mask_w)  # [BLOCK_W]
    if SUMS == 4:
        tl.store(sums_ptr + 2 * W + offs, tl.sum(d_hidden_sum, axis=0), mask=mask_w)  # [BLOCK_W]
        tl.store(sums_ptr + 3 * W + offs, tl.sum(d_x_sum, axis=0), mask=mask_w)  # [BLOCK_W]


# ---- launches of the kernels -----------------------------------------------------------------------------------------


def _launch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, weight, bias, eps, dtype, rms = Forward(*arguments)
    W = x.shape[-1]
    if W > MAX_WIDTH:
        return NotImplemented
    hidden, normed, mean, rstd = _fake(*arguments)
    R, options = rstd.numel(), launch_options("add_layer_norm_fwd", x, W=W)
    launch(
        _add_layer_norm_fwd_kernel,
        (triton.cdiv(R, options["BLOCK_R"]),),
        device=x.device,
        x_ptr=x.contiguous(),
        residual_ptr=contiguous_or_none(residual),
        weight_ptr=weight.contiguous(),
        bias_ptr=contiguous_or_none(bias),
        hidden_ptr=None if residual is None else hidden,
        normed_ptr=normed,
        mean_ptr=None if rms else mean,
        rstd_ptr=rstd,
        R=R,
        eps=eps,
        W=W,
        BLOCK_W=triton.next_power_of_2(W),
        **options,
    )
    return hidden, normed, mean, rstd


def _has_kernel(hidden: Tensor) -> bool:
    """Return True if the rows have a Triton kernel."""
    return hidden.dtype != torch.float64 and hidden.shape[-1] <= MAX_WIDTH


def _backward_rows(hidden: Tensor) -> tuple[int, int, Mapping[str, Any]]:
    """Return the number of programs of backward, the rows of each, and the launch options."""
    W = int(hidden.shape[-1])  # a symbol in the fake of a compiled call
    options = launch_options("add_layer_norm_bwd_rows", hidden, W=W)
    return *blocks_of_rows(hidden.numel() // W, options["BLOCK_R"], ROWS_PER_SUM, MAX_SUMS), options


def _launch_backward(*arguments: Any) -> BackwardResults:
    call = Backward(*arguments)
    if not _has_kernel(call.hidden):  # the registration falls back by the dtype of d_normed, which may be another
        return NotImplemented
    W, R, device = call.hidden.shape[-1], call.rstd.numel(), call.hidden.device
    P, rows, options = _backward_rows(call.hidden)
    out = _outputs(call)
    SUMS = 4 if call.need_sums else 2 if call.need_weight or call.need_bias or call.partial else 0
    sums = out.partial_sums  # [P, SUMS · W]
    if not call.partial:
        sums = torch.empty(P, SUMS * W, dtype=torch.float32, device=device)
    launch(
        _add_layer_norm_bwd_rows_kernel,
        (P,),
        device=device,
        d_normed_ptr=call.d_normed.contiguous(),
        d_hidden_ptr=contiguous_or_none(call.d_hidden),
        hidden_ptr=call.hidden.contiguous(),
        mean_ptr=None if call.rms else call.mean.contiguous(),
        rstd_ptr=call.rstd.contiguous(),
        weight_ptr=call.weight.contiguous(),
        bias_ptr=contiguous_or_none(call.bias) if call.need_normed else None,
        d_x_ptr=out.d_x if call.need_x else None,
        d_x_cast_ptr=None if call.cast is None else out.d_x_cast,
        normed_ptr=out.normed if call.need_normed else None,
        sums_ptr=sums if SUMS else None,
        R=R,
        rows=rows,
        W=W,
        SUMS=SUMS,
        BLOCK_W=triton.next_power_of_2(W),
        **options,
    )
    if SUMS and not call.partial:
        results = (out.d_weight, out.d_bias, out.d_hidden_sum, out.d_x_sum)[:SUMS]
        needed = [(x, total) for x, total in zip(sums.split(W, dim=1), results, strict=True) if total.numel() > 0]
        write_column_sums(*zip(*needed, strict=True))
    return out


def _outputs(call: Backward) -> BackwardResults:
    """Allocate the results: [0] where not needed, since an operator cannot return None."""
    hidden, weight = call.hidden, call.weight

    def empty(like: Tensor, need: bool, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_empty(like.shape if need else 0, dtype=dtype)

    W = hidden.shape[-1]
    sums_shape = (_backward_rows(hidden)[0], (4 if call.need_sums else 2) * W) if call.partial else 0
    return BackwardResults(
        d_x=empty(hidden, call.need_x),
        d_weight=empty(weight, call.need_weight and not call.partial),
        d_bias=empty(weight, call.need_bias and not call.partial),
        d_x_cast=empty(hidden, call.cast is not None, call.cast),
        normed=empty(hidden, call.need_normed, call.d_normed.dtype),
        d_hidden_sum=empty(weight, call.need_sums and not call.partial),
        d_x_sum=empty(weight, call.need_sums and not call.partial),
        partial_sums=call.rstd.new_empty(sums_shape),
    )


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def _fallback(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, weight, bias, eps, dtype, rms = Forward(*arguments)
    hidden = (x if residual is None else (x + residual).to(x.dtype)).contiguous()
    hidden_wide = dtypes.at_least_fp32(hidden)  # [..., W]
    mean = hidden_wide.new_empty(0) if rms else hidden_wide.mean(dim=-1)  # [...]
    centred = hidden_wide if rms else hidden_wide - mean[..., None]  # [..., W]
    variance = centred.square().mean(dim=-1) + eps  # [...]
    rstd = variance.rsqrt().masked_fill(variance.isinf(), torch.nan)  # [...]; rsqrt gives 0
    normed = _affine(centred * rstd[..., None], weight, bias)
    return x.new_empty(0) if residual is None else hidden, normed.to(dtype or x.dtype), mean, rstd


def _affine(unit: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    scaled = unit * weight.to(unit.dtype)
    return scaled if bias is None else scaled + bias.to(unit.dtype)


def _fallback_backward(*arguments: Any) -> BackwardResults:
    call = Backward(*arguments)
    d_x, d_weight, d_bias = _gradients(call)
    if d_x is not None and call.d_hidden is not None:
        d_x = d_x + call.d_hidden
    normed = _affine(_unit(call), call.weight, call.bias) if call.need_normed else None
    d_hidden_sum, d_x_sum = (
        _sum_of_rows(x.to(call.rstd.dtype)) if call.need_sums and x is not None else None for x in (call.d_hidden, d_x)
    )

    def result(x: Tensor | None, dtype: torch.dtype) -> Tensor:
        return call.hidden.new_empty(0, dtype=dtype) if x is None else x.to(dtype)

    stream, parameter = call.hidden.dtype, call.weight.dtype
    return BackwardResults(
        d_x=result(d_x, stream),
        d_weight=result(d_weight, parameter),
        d_bias=result(d_bias, parameter),
        d_x_cast=result(None if call.cast is None else d_x, call.cast or stream),
        normed=result(normed, call.d_normed.dtype),
        d_hidden_sum=result(d_hidden_sum, parameter),
        d_x_sum=result(d_x_sum, parameter),
        partial_sums=call.rstd.new_empty(0),
    )


def _gradients(call: Backward) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute d_x without d_hidden, d_weight and d_bias in the dtype of the statistics; None if not needed."""
    # Not autograd of the reference: backward receives the statistics instead of eps.
    d_normed, hidden, weight = (x.to(call.rstd.dtype).contiguous() for x in (call.d_normed, call.hidden, call.weight))
    rstd = call.rstd[..., None]  # [..., 1]
    if not call.rms:
        return torch.ops.aten.native_layer_norm_backward(
            d_normed,
            hidden,
            hidden.shape[-1:],
            call.mean[..., None],
            rstd,
            weight,
            torch.zeros_like(weight),
            (call.need_x, call.need_weight, call.need_bias),
        )
    unit, g = _unit(call), d_normed * weight  # [..., W] each
    return (
        (g - unit * (g * unit).mean(dim=-1, keepdim=True)) * rstd if call.need_x else None,
        _sum_of_rows(d_normed * unit) if call.need_weight else None,
        _sum_of_rows(d_normed) if call.need_bias else None,
    )


def _unit(call: Backward) -> Tensor:
    """Compute x̂, [..., W], in the dtype of the statistics."""
    hidden = call.hidden.to(call.rstd.dtype).contiguous()
    return (hidden if call.rms else hidden - call.mean[..., None]) * call.rstd[..., None]


def _sum_of_rows(x: Tensor) -> Tensor:
    """Sum over all dimensions but the last: [..., W] → [W]. x may be a vector."""
    return x.reshape(-1, x.shape[-1]).sum(dim=0)


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, _, _, _, dtype, rms = Forward(*arguments)
    hidden = x.new_empty(0 if residual is None else x.shape)  # [..., W]
    wide = dtypes.wide_dtype(x.dtype)
    mean, rstd = (x.new_empty(shape, dtype=wide) for shape in (0 if rms else x.shape[:-1], x.shape[:-1]))  # [...]
    return hidden, x.new_empty(x.shape, dtype=dtype or x.dtype), mean, rstd


def _fake_backward(*arguments: Any) -> BackwardResults:
    call = Backward(*arguments)
    # The C++ kernel and the fallback ignore `partial`.
    uses_triton = launching.launches_on(call.hidden.device) and _has_kernel(call.hidden)
    return _outputs(call._replace(partial=call.partial and uses_triton))


# ---- registration ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, *_, rms = inputs
    hidden, _, mean, rstd = output
    ctx.rms, ctx.residual_dtype = rms, None if residual is None else residual.dtype
    ctx.mark_non_differentiable(mean, rstd, *([hidden] if residual is None else []))
    ctx.save_for_backward(x if residual is None else hidden, mean, rstd, weight)


def _backward(ctx: Any, d_hidden: Tensor | None, d_normed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    hidden, mean, rstd, weight = ctx.saved_tensors
    cast = None if not need_residual or ctx.residual_dtype == hidden.dtype else ctx.residual_dtype
    if d_normed is None:
        return d_hidden, d_hidden if cast is None or d_hidden is None else d_hidden.to(cast)
    call = Backward(
        d_normed, d_hidden, hidden, mean, rstd, weight, None, need_x or need_residual, need_weight, need_bias,
        cast=cast, rms=ctx.rms,
    )  # fmt: skip
    d_x, d_weight, d_bias, d_x_cast, *_ = add_layer_norm_backward(*call)
    return d_x, d_x if cast is None else d_x_cast, d_weight, d_bias


add_layer_norm = registration.define(
    f"add_layer_norm({registration.arguments_of(Forward)}) -> (Tensor hidden, Tensor normed, Tensor mean, Tensor rstd)",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    fallback_note=f"fp64, rows wider than {MAX_WIDTH}",
    backward=autograd.GradientRule(_save, _backward),
    autocast_arguments=2,
)
add_layer_norm_backward = registration.define(
    f"add_layer_norm_backward({registration.arguments_of(Backward)})"
    " -> (Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_x_cast, Tensor normed, Tensor d_hidden_sum,"
    " Tensor d_x_sum, Tensor partial_sums)",
    fallback=_fallback_backward,
    fake=_fake_backward,
    launch=_launch_backward,
)
