"""`mlp_activation`: bias and activation of an MLP.

    u = x + bias,   out = u · g(u),   d_x = d_out · (g(u) + u · g'(u)),   d_bias = Σ d_x over all rows
    quick_gelu: g(u) = σ(1.702 u);   gelu: g(u) = Φ(u);   gelu_tanh: g(u) = σ(2 √(2/π) (u + 0.044715 u³))

`swiglu` takes rows twice as wide, the gate u and the linear part v, each with its half of the bias, with g(u) = σ(u):

    out = u · g(u) · v,   d_u = d_out · v · (g(u) + u · g'(u)),   d_v = d_out · u · g(u),   d_x = (d_u, d_v)

Saved for backward: x and bias; g is recomputed. For a fused block backward also returns out, recomputed.

On a GPU one kernel sums the gradient of the bias over fixed blocks of rows, and a second adds these sums in order. With
`partial` they are returned, and `column_sums` adds them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import autograd, launching, registration
from .launching import contiguous_or_none, launch, launch_options, tl, triton
from .row_sums import blocks_of_rows, write_column_sums

# `kind` of the schemas is an index: strings leak in the stable ABI.
KINDS = ("quick_gelu", "gelu", "gelu_tanh", "swiglu")

ROWS_PER_SUM = 32  # least number of rows per program of backward; with fewer there are many more sums to write
MAX_SUMS = 256  # largest number of blocks of rows: with the blocks of columns enough for every GPU


class Backward(NamedTuple):
    """Arguments of the backward operator; its schema is made from them."""

    d_out: Tensor  # [..., W]
    x: Tensor  # [..., W], for swiglu [..., 2W]
    bias: Tensor | None  # [W], for swiglu [2W]
    kind: int  # of KINDS
    need_x: bool
    need_bias: bool
    # For fused blocks
    need_out: bool = False
    partial: bool = False


class BackwardResults(NamedTuple):
    """Results of the backward operator; empty if not needed."""

    d_x: Tensor  # [..., W], for swiglu [..., 2W]
    d_bias: Tensor  # [W], for swiglu [2W]
    out: Tensor  # [..., W]
    partial_sums: Tensor  # with `partial` on a GPU, fp32 [P, W], for swiglu [P, 2W]; d_bias is then empty


@triton.jit
def _sigmoid(z, scale):
    """Compute σ(z) and scale · σ'(z) from exp(−|z|), without overflow or cancellation."""
    e = tl.exp(-tl.abs(z))
    upper = 1.0 / (1.0 + e)
    return tl.where(z < 0, e * upper, upper), scale * (e * upper * upper)


@triton.jit
def _gate(u, KIND: tl.constexpr):
    """Compute g(u) and g'(u)."""
    if KIND == "quick_gelu":
        value, slope = _sigmoid(1.702 * u, 1.702)
    elif KIND == "gelu":
        value = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        slope = tl.exp(-0.5 * u * u) * 0.3989422804014327
    elif KIND == "swiglu":
        value, slope = _sigmoid(u, 1.0)
    else:
        # Beyond 30 the sigmoid is 0 or 1, while u³ may be infinite. 2 √(2/π) = 1.5957691216057308.
        inner = tl.where(u < -30, -30.0, tl.where(u > 30, 30.0, u))
        square = inner * inner
        value, slope = _sigmoid(
            1.5957691216057308 * inner * (1.0 + 0.044715 * square), 1.5957691216057308 * (1.0 + 0.134145 * square)
        )
    return value, slope


@triton.jit
def _mlp_activation_fwd_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    R,
    W: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """out = u · g(u), for swiglu u · g(u) · v. One program: BLOCK_R rows, BLOCK_W columns."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    offs, mask = offs_r[:, None] * W + offs_w[None, :], (offs_r < R)[:, None] & mask_w[None, :]
    offs_x = offs_r[:, None] * (2 * W if KIND == "swiglu" else W) + offs_w[None, :]
    u = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
    if bias_ptr is not None:
        u += tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_W]
    value, _ = _gate(u, KIND)  # [BLOCK_R, BLOCK_W]
    if KIND == "swiglu":
        v = tl.load(x_ptr + W + offs_x, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
        if bias_ptr is not None:
            v += tl.load(bias_ptr + W + offs_w, mask=mask_w, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_W]
        value *= v
    tl.store(out_ptr + offs, (u * value).to(out_ptr.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_W]


@triton.jit
def _mlp_activation_bwd_rows_kernel(
    d_out_ptr,
    x_ptr,
    bias_ptr,
    d_x_ptr,
    out_ptr,
    d_bias_sums_ptr,
    R,
    rows,
    W: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """d_x = d_out · (g(u) + u · g'(u)), for swiglu (d_u, d_v), out, Σ d_x.

    One program: BLOCK_W columns of `rows` rows, for swiglu of each half of x.
    """
    program = tl.program_id(0).to(tl.int64)
    offs_w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    WIDTH: tl.constexpr = 2 * W if KIND == "swiglu" else W  # of x
    bias = tl.zeros([BLOCK_W], tl.float32)
    bias_v = tl.zeros([BLOCK_W], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)  # [BLOCK_W]
        if KIND == "swiglu":
            bias_v = tl.load(bias_ptr + W + offs_w, mask=mask_w, other=0.0).to(tl.float32)  # [BLOCK_W]
    d_bias = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    d_bias_v = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    # 1. Gradients of the rows, and the sum of d_x
    for start in range(0, rows, BLOCK_R):
        offs_r = program * rows + start + tl.arange(0, BLOCK_R)
        offs, mask = offs_r[:, None] * W + offs_w[None, :], (offs_r < R)[:, None] & mask_w[None, :]
        offs_x = offs_r[:, None] * WIDTH + offs_w[None, :]
        u = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32) + bias[None, :]  # [BLOCK_R, BLOCK_W]
        value, slope = _gate(u, KIND)  # [BLOCK_R, BLOCK_W] each
        d_out = tl.load(d_out_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_W]
        d_x = d_out * (value + u * slope)  # [BLOCK_R, BLOCK_W]
        if KIND == "swiglu":
            v = tl.load(x_ptr + W + offs_x, mask=mask, other=0.0).to(tl.float32) + bias_v[None, :]  # [BLOCK_R, BLOCK_W]
            d_v = d_out * (u * value)  # [BLOCK_R, BLOCK_W]
            if d_x_ptr is not None:
                tl.store(d_x_ptr + W + offs_x, d_v.to(d_x_ptr.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_W]
            d_bias_v += tl.where(mask, d_v, 0.0)
            value *= v
            d_x *= v
        if d_x_ptr is not None:
            tl.store(d_x_ptr + offs_x, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_W]
        if out_ptr is not None:
            tl.store(out_ptr + offs, (u * value).to(out_ptr.dtype.element_ty), mask=mask)  # [BLOCK_R, BLOCK_W]
        d_bias += tl.where(mask, d_x, 0.0)  # beyond R d_x is 0 · g, and NaN if the bias is infinite
    # 2. This program's row of the sums, [P, W], for swiglu [P, 2W]
    if d_bias_sums_ptr is not None:
        sums_ptr = d_bias_sums_ptr + program * WIDTH + offs_w
        tl.store(sums_ptr, tl.sum(d_bias, axis=0), mask=mask_w)  # [BLOCK_W]
        if KIND == "swiglu":
            tl.store(sums_ptr + W, tl.sum(d_bias_v, axis=0), mask=mask_w)  # [BLOCK_W]


# ---- launches of the kernels -----------------------------------------------------------------------------------------


def _launch(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    out = _fake(x, bias, kind)  # [..., W]
    W = out.shape[-1]
    R, options = out.numel() // W, _options("mlp_activation_fwd", x, W)
    launch(
        _mlp_activation_fwd_kernel,
        (triton.cdiv(R, options["BLOCK_R"]), triton.cdiv(W, options["BLOCK_W"])),
        device=x.device,
        x_ptr=x.contiguous(),
        bias_ptr=contiguous_or_none(bias),
        out_ptr=out,
        R=R,
        W=W,
        KIND=KINDS[kind],
        **options,
    )
    return out


def _launch_backward(*arguments: Any) -> BackwardResults:
    call = Backward(*arguments)
    W, width, device = call.d_out.shape[-1], call.x.shape[-1], call.x.device
    P, rows, options = _backward_rows(call)
    results = _outputs(call)
    sums = results.partial_sums  # [P, W], for swiglu [P, 2W]
    if call.need_bias and not call.partial:
        sums = torch.empty(P, width, dtype=torch.float32, device=device)
    launch(
        _mlp_activation_bwd_rows_kernel,
        (P, triton.cdiv(W, options["BLOCK_W"])),
        device=device,
        d_out_ptr=call.d_out.contiguous(),
        x_ptr=call.x.contiguous(),
        bias_ptr=contiguous_or_none(call.bias),
        d_x_ptr=results.d_x if call.need_x else None,
        out_ptr=results.out if call.need_out else None,
        d_bias_sums_ptr=sums if call.need_bias else None,
        R=call.d_out.numel() // W,
        rows=rows,
        W=W,
        KIND=KINDS[call.kind],
        **options,
    )
    if call.need_bias and not call.partial:
        write_column_sums([sums], [results.d_bias])
    return results


def _options(kernel: str, x: Tensor, W: int) -> Mapping[str, Any]:
    """Return the launch options for a result [..., W]; rows of x are twice as wide for swiglu, of half as many rows."""
    options = launch_options(kernel, x, W=int(W))  # a symbol in the fake of a compiled call
    return {**options, "BLOCK_R": max(1, options["BLOCK_R"] * W // x.shape[-1])}


def _backward_rows(call: Backward) -> tuple[int, int, Mapping[str, Any]]:
    """Return the number of blocks of rows of backward, the rows of each, and the launch options."""
    W = call.d_out.shape[-1]
    options = _options("mlp_activation_bwd_rows", call.x, W)
    return *blocks_of_rows(call.d_out.numel() // W, options["BLOCK_R"], ROWS_PER_SUM, MAX_SUMS), options


def _outputs(call: Backward) -> BackwardResults:
    """Allocate the results: [0] where not needed, since an operator cannot return None."""
    partial = call.partial and call.need_bias
    inputs = call.x, call.x if call.bias is None else call.bias, call.d_out
    d_x, d_bias, out = autograd.gradients_like(inputs, (call.need_x, call.need_bias and not partial, call.need_out))
    partial_sums = d_bias.new_empty(0)
    if partial:
        partial_sums = d_bias.new_empty(_backward_rows(call)[0], call.x.shape[-1], dtype=torch.float32)
    return BackwardResults(d_x, d_bias, out, partial_sums)


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def _fallback(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    return reference.mlp_activation(x.contiguous(), bias, KINDS[kind])


def _fallback_backward(*arguments: Any) -> BackwardResults:
    call = Backward(*arguments)
    x, function = call.x.contiguous(), functools.partial(reference.mlp_activation, kind=KINDS[call.kind])
    if call.bias is None:
        (d_x,) = autograd.reference_gradients(function, (x,), (call.need_x,), call.d_out)
        d_bias = x.new_empty(0)
    else:
        needs = call.need_x, call.need_bias
        d_x, d_bias = autograd.reference_gradients(function, (x, call.bias), needs, call.d_out)
    out = function(x, call.bias) if call.need_out else x.new_empty(0)
    return BackwardResults(d_x, d_bias, out, partial_sums=d_bias.new_empty(0))


def _fake(x: Tensor, bias: Tensor | None, kind: int) -> Tensor:
    *rest, width = x.shape
    return x.new_empty(*rest, width // 2 if KINDS[kind] == "swiglu" else width)


def _fake_backward(*arguments: Any) -> BackwardResults:
    call = Backward(*arguments)
    # The C++ kernel and the fallback ignore `partial`.
    uses_triton = launching.launches_on(call.x.device) and call.x.dtype != torch.float64
    return _outputs(call._replace(partial=call.partial and uses_triton))


# ---- registration ----------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
    need_x, need_bias, _ = ctx.needs_input_grad
    x, bias = ctx.saved_tensors
    call = Backward(d_out, x, bias, ctx.kind, need_x=need_x, need_bias=need_bias)
    d_x, d_bias, *_ = mlp_activation_backward(*call)
    return d_x, d_bias


mlp_activation = registration.define(
    "mlp_activation(Tensor x, Tensor? bias, int kind) -> Tensor out",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    backward=autograd.GradientRule(_save, _backward),
    autocast_arguments=1,
)
mlp_activation_backward = registration.define(
    f"mlp_activation_backward({registration.arguments_of(Backward)})"
    " -> (Tensor d_x, Tensor d_bias, Tensor out, Tensor partial_sums)",
    fallback=_fallback_backward,
    fake=_fake_backward,
    launch=_launch_backward,
)
