"""`rotary_embedding`: rotate pairs of columns of each head by angles that depend on the position of the row.

    out_1 = x_1 · cos − x_2 · sin,   out_2 = x_2 · cos + x_1 · sin
    interleaved: x_1, x_2 are columns 2i and 2i + 1 of a head of width E;   else columns i and i + E/2

Row r has the position r mod T. The first `heads` heads of a row are rotated, the others copied. `inverse` rotates by
the negative angle: it is the transpose, so backward is the operator itself. Saved for backward: cos and sin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import autograd, registration
from .launching import launch, launch_options, tl, triton


@triton.jit
def _rotary_embedding_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    R,
    T,
    heads,
    W: tl.constexpr,
    E: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out_1 = x_1 · cos − x_2 · sin, out_2 = x_2 · cos + x_1 · sin. One program: BLOCK_H heads of BLOCK_R rows."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_p, mask_r = tl.arange(0, BLOCK_P), offs_r < R
    # 1. Cosines and sines of all pairs of a head, at the positions of the rows
    offs = (offs_r % T)[:, None] * (E // 2) + offs_p[None, :]
    mask = mask_r[:, None] & (offs_p < E // 2)[None, :]
    cos = tl.load(cos_ptr + offs, mask=mask, other=0.0)[:, None, :]  # [BLOCK_R, 1, BLOCK_P]
    sin = tl.load(sin_ptr + offs, mask=mask, other=0.0)[:, None, :]  # [BLOCK_R, 1, BLOCK_P]
    if INVERSE:
        sin = -sin
    # 2. The pairs of the heads
    offs_head = offs_r.to(tl.int64)[:, None] * W + offs_h[None, :] * E  # [BLOCK_R, BLOCK_H]
    mask_head = mask_r[:, None] & (offs_h < W // E)[None, :]  # [BLOCK_R, BLOCK_H]
    if INTERLEAVED:
        offs_e = tl.arange(0, 2 * BLOCK_P)
        offs = offs_head[:, :, None] + offs_e[None, None, :]
        mask = mask_head[:, :, None] & (offs_e < E)[None, None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_H, 2 · BLOCK_P]
        first, second = tl.split(tl.reshape(x, [BLOCK_R, BLOCK_H, BLOCK_P, 2]))  # [BLOCK_R, BLOCK_H, BLOCK_P] each
    else:
        offs = offs_head[:, :, None] + offs_p[None, None, :]
        mask = mask_head[:, :, None] & (offs_p < E // 2)[None, None, :]
        first = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_H, BLOCK_P]
        second = tl.load(x_ptr + offs + E // 2, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_H, BLOCK_P]
    # 3. Rotated in the first heads; a product with cos = 1 and sin = 0 would not copy infinities
    rotated = (offs_h < heads)[None, :, None]
    out_1 = tl.where(rotated, first * cos - second * sin, first)  # [BLOCK_R, BLOCK_H, BLOCK_P]
    out_2 = tl.where(rotated, second * cos + first * sin, second)  # [BLOCK_R, BLOCK_H, BLOCK_P]
    dtype = out_ptr.dtype.element_ty
    if INTERLEAVED:
        out = tl.reshape(tl.join(out_1, out_2), [BLOCK_R, BLOCK_H, 2 * BLOCK_P])
        tl.store(out_ptr + offs, out.to(dtype), mask=mask)  # [BLOCK_R, BLOCK_H, 2 · BLOCK_P]
    else:
        tl.store(out_ptr + offs, out_1.to(dtype), mask=mask)  # [BLOCK_R, BLOCK_H, BLOCK_P]
        tl.store(out_ptr + offs + E // 2, out_2.to(dtype), mask=mask)  # [BLOCK_R, BLOCK_H, BLOCK_P]


def _launch(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool, inverse: bool) -> Tensor:
    (R, W), (T, half) = x.shape, cos.shape
    E = 2 * half
    options = launch_options("rotary_embedding", x, E=E)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # [R, W]
    launch(
        _rotary_embedding_kernel,
        (triton.cdiv(R, options["BLOCK_R"]), triton.cdiv(W // E, options["BLOCK_H"])),
        device=x.device,
        x_ptr=x.contiguous(),
        cos_ptr=cos.contiguous(),
        sin_ptr=sin.contiguous(),
        out_ptr=out,
        R=R,
        T=T,
        heads=heads,
        W=W,
        E=E,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        BLOCK_P=triton.next_power_of_2(half),
        **options,
    )
    return out


def _fallback(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool, inverse: bool) -> Tensor:
    return reference.rotary_embedding(x, cos, -sin if inverse else sin, heads, interleaved)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, *ctx.options = inputs
    for name, x in (("cos", cos), ("sin", sin)):
        if x.requires_grad:
            raise ValueError(
                f"rotary_embedding: {name} is a constant; got one that requires grad. Use {name}.detach()."
            )
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
    heads, interleaved, inverse = ctx.options
    return (rotary_embedding(d_out, *ctx.saved_tensors, heads, interleaved, not inverse),)


rotary_embedding = registration.define(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, int heads, bool interleaved, bool inverse) -> Tensor out",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
    backward=autograd.GradientRule(_save, _backward),
    autocast_arguments=1,
)
