"""What the Triton kernels of operators on unit rows share: a tile of cosines, and the way back from the logits.

    cosine_bk = ⟨x_b/|x_b|, t_k/|t_k|⟩
    d_x_b = s · (1 − u_b u_bᵀ) Σ_k G_bk t_k,   d_t_k = s · (1 − v_k v_kᵀ) Σ_b G_bk x_b,   G_bk = d_z_bk/(|x_b| |t_k|)

with u and v the unit rows. With both lengths in the factors G, the sums are matrix products with the rows as they are
in memory: `contract` leaves them to the library, which fills a GPU at any shape. What is theirs, a panel of G, has a
bounded size. A kernel of our own would save no launch: gathered rows, product and unit norm are one each either way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .launching import dot_precision, launch, target, tl, triton

PANEL = 1 << 24  # factors in memory at once: 32 MiB in bf16


class Blocks(NamedTuple):
    """Tiles of the product [images, classes], and how they are computed."""

    BLOCK_B: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


# BLOCK_D is 128 bytes of a row, a line of the cache. Up to FEW images take the 16 rows that the matrix units ask for,
# and small tiles, so that 1,000 classes occupy some of the GPU; more take square tiles, which read each row less often.
FEW = 32
_BLOCKS = {
    ("few", 4): Blocks(16, 32, 32, num_warps=2, num_stages=4),
    ("few", 2): Blocks(16, 32, 64, num_warps=2, num_stages=4),
    ("many", 4): Blocks(64, 64, 32, num_warps=4, num_stages=3),
    ("many", 2): Blocks(128, 128, 64, num_warps=8, num_stages=3),
}


def blocks_for(B: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Tiles for so many images of a dtype."""
    blocks = _BLOCKS["few" if B <= FEW else "many", dtype.itemsize]
    # 64 KiB of shared memory there, and the loop keeps one tile of each operand in registers.
    return blocks if target(device).backend == "cuda" else blocks._replace(num_stages=2)


@triton.jit
def cosine_tile(
    image_ptr,
    text_ptr,
    offs_b,
    rows_k,
    mask_b,
    mask_k,
    D,
    stride_image_b,
    stride_text_k,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Cosines [BLOCK_B, BLOCK_K] of images and rows of the bank, and the lengths of both.

    The rows themselves are multiplied, their products exact in 16 bits, and the cosines divided in fp32.
    """
    image_row = image_ptr + offs_b.to(tl.int64)[:, None] * stride_image_b
    text_row = text_ptr + rows_k.to(tl.int64)[None, :] * stride_text_k
    product = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    image_squares = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    text_squares = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        image = tl.load(image_row + offs_d[None, :], mask=mask_b[:, None] & mask_d[None, :], other=0.0)
        text = tl.load(text_row + offs_d[:, None], mask=mask_d[:, None] & mask_k[None, :], other=0.0)
        product = tl.dot(image, text, product, input_precision=PRECISION)
        image_squares += image.to(tl.float32) * image.to(tl.float32)
        text_squares += text.to(tl.float32) * text.to(tl.float32)
    image_norm = tl.sqrt(tl.sum(image_squares, axis=1))
    text_norm = tl.sqrt(tl.sum(text_squares, axis=0))
    cosine = product / tl.maximum(image_norm, eps)[:, None] / tl.maximum(text_norm, eps)[None, :]
    return cosine, image_norm, text_norm


@triton.jit
def _unit_rows_bwd_kernel(
    rows_ptr,
    ids_ptr,
    sums_ptr,
    scale_ptr,
    factor_ptr,
    divisor_ptr,
    d_rows_ptr,
    D,
    stride_rows,
    stride_d_rows,
    eps,
    BLOCK_D: tl.constexpr,
):
    """d_x = s · factor/divisor · (sum − x · ⟨x, sum⟩/|x|²); a row shorter than eps was divided by a constant.

    One program: one row. Without ids the rows are in order; without factor or divisor these are 1.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid
    if ids_ptr is not None:
        row = tl.load(ids_ptr + pid)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    x = tl.load(rows_ptr + row * stride_rows + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    total = tl.load(sums_ptr + pid * D + offs_d, mask=mask_d, other=0.0)
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    unit = x / tl.maximum(norm, eps)
    along = tl.where(norm < eps, 0.0, tl.sum(unit * total, axis=0))
    factor = tl.load(scale_ptr).to(tl.float32) * upstream_of(factor_ptr, divisor_ptr)
    tl.store(d_rows_ptr + row * stride_d_rows + offs_d, factor * (total - unit * along), mask=mask_d)


@triton.jit
def upstream_of(factor_ptr, divisor_ptr):
    """factor/divisor; 0 where the divisor is: a mean over nothing has no gradient."""
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr).to(tl.float32)
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr)
        factor = tl.where(divisor == 0.0, 0.0, factor / divisor)
    return factor


def cosine_arguments(image: Tensor, text: Tensor) -> dict[str, Any]:
    """Arguments that every kernel with a `cosine_tile` takes; both have contiguous rows."""
    return dict(
        image_ptr=image,
        text_ptr=text,
        D=image.shape[1],
        stride_image_b=image.stride(0),
        stride_text_k=text.stride(0),
        eps=reference.UNIT_NORM_EPS,
        PRECISION=dot_precision(image.dtype, image.device),
    )


def with_contiguous_rows(x: Tensor) -> Tensor:
    """The matrix, copied if its columns are apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def factors_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the panel of factors. fp16 has no room for lengths and small probabilities: its products are fp32's."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def contract(factors: Tensor, rows: Tensor) -> Tensor:
    """factors · rows, summed and returned in fp32."""
    if factors.dtype == torch.float32:
        return factors @ rows.float()
    return torch.mm(factors, rows, out_dtype=torch.float32)


def through_unit_norm(
    rows: Tensor,
    ids: Tensor | None,
    sums: Tensor,
    logit_scale: Tensor,
    factor: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Gradient of the rows from the sums over factors; zero for rows that are not among the ids."""
    D = rows.shape[1]
    d_rows = (torch.empty if ids is None else torch.zeros)(rows.shape, dtype=rows.dtype, device=rows.device)
    launch(
        _unit_rows_bwd_kernel,
        (sums.shape[0],),
        device=rows.device,
        num_warps=4 if D > 256 else 1,
        rows_ptr=rows,
        ids_ptr=ids,
        sums_ptr=sums,
        scale_ptr=logit_scale,
        factor_ptr=factor,
        divisor_ptr=divisor,
        d_rows_ptr=d_rows,
        D=D,
        stride_rows=rows.stride(0),
        stride_d_rows=D,
        eps=reference.UNIT_NORM_EPS,
        BLOCK_D=triton.next_power_of_2(D),
    )
    return d_rows


def nothing(like: Tensor) -> Tensor:
    """Stands for a gradient that nobody needs: an operator must return a tensor."""
    return like.new_empty((0, like.shape[1]) if like.dim() == 2 else (0,))
