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


# Up to FEW images take the 16 rows that the matrix units ask for, and few classes, so that 1,000 of them occupy some of
# the GPU; more take squarer tiles, which read each row less often, as large as registers allow beside the softmax
# (bench.aot). BLOCK_D is 128 bytes of a row, a line of the cache.
FEW = 32
_BLOCKS = {
    ("cuda", "few", 4): Blocks(16, 32, 32, num_warps=4, num_stages=4),
    ("cuda", "few", 2): Blocks(16, 32, 64, num_warps=4, num_stages=4),
    ("cuda", "many", 4): Blocks(64, 32, 32, num_warps=4, num_stages=3),
    ("cuda", "many", 2): Blocks(64, 64, 64, num_warps=8, num_stages=3),
    ("hip", "few", 4): Blocks(16, 32, 32, num_warps=2, num_stages=2),
    ("hip", "few", 2): Blocks(16, 32, 64, num_warps=2, num_stages=2),
    ("hip", "many", 4): Blocks(64, 32, 32, num_warps=4, num_stages=2),
    ("hip", "many", 2): Blocks(64, 64, 64, num_warps=8, num_stages=2),
}


def blocks_for(B: int, dtype: torch.dtype, device: torch.device) -> Blocks:
    """Tiles for so many images of a dtype."""
    return _BLOCKS[target(device).backend, "few" if B <= FEW else "many", dtype.itemsize]


@triton.jit
def cosine_tile(
    image_ptr,
    text_ptr,
    image_norm_ptr,
    text_norm_ptr,
    rows_b,
    places_k,
    rows_k,
    D,
    stride_image_b,
    stride_text_k,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """Cosines [BLOCK_B, BLOCK_K] of images and rows of the bank, and the lengths of both.

    All rows must exist: beyond the last one it comes again, which costs nothing, where masks would cost registers.
    places_k are those of rows_k among the sampled ones. The rows themselves are multiplied, their products exact in 16
    bits, and the cosines divided in fp32. The lengths are loaded, or summed up on the way if they are to be measured.
    """
    image_row = image_ptr + rows_b.to(tl.int64)[:, None] * stride_image_b
    text_row = text_ptr + rows_k.to(tl.int64)[None, :] * stride_text_k
    product = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    if MEASURE:
        image_squares = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        text_squares = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        image = tl.load(image_row + offs_d[None, :], mask=mask_d[None, :], other=0.0)
        text = tl.load(text_row + offs_d[:, None], mask=mask_d[:, None], other=0.0)
        product = tl.dot(image, text, product, input_precision=PRECISION)
        if MEASURE:
            image_squares += image.to(tl.float32) * image.to(tl.float32)
            text_squares += text.to(tl.float32) * text.to(tl.float32)
    if MEASURE:
        image_norm = tl.sqrt(tl.sum(image_squares, axis=1))
        text_norm = tl.sqrt(tl.sum(text_squares, axis=0))
    else:
        image_norm = tl.load(image_norm_ptr + rows_b)
        text_norm = tl.load(text_norm_ptr + places_k)
    cosine = product / tl.maximum(image_norm, eps)[:, None] / tl.maximum(text_norm, eps)[None, :]
    return cosine, image_norm, text_norm


@triton.jit
def _row_norms_kernel(rows_ptr, ids_ptr, norm_ptr, C, D, stride_rows, BLOCK_D: tl.constexpr):
    """|x|. One program: one row; without ids they are in order.

    Ids out of range stand for row 0 until they are refused.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid
    if ids_ptr is not None:
        row = tl.load(ids_ptr + pid)
        row = tl.where((row >= 0) & (row < C), row, 0)
    offs_d = tl.arange(0, BLOCK_D)
    x = tl.load(rows_ptr + row * stride_rows + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    tl.store(norm_ptr + pid, tl.sqrt(tl.sum(x * x, axis=0)))


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


def measures(B: int) -> bool:
    """Whether the product itself is to measure the rows: it saves two launches, and costs registers."""
    return B <= FEW


def row_norms(rows: Tensor, ids: Tensor | None = None) -> Tensor:
    """Norms of the rows, [n], in fp32."""
    n, D = (rows if ids is None else ids).shape[0], rows.shape[1]
    norm = torch.empty(n, dtype=torch.float32, device=rows.device)
    launch(
        _row_norms_kernel,
        (n,),
        device=rows.device,
        num_warps=1,
        rows_ptr=rows,
        ids_ptr=ids,
        norm_ptr=norm,
        C=rows.shape[0],
        D=D,
        stride_rows=rows.stride(0),
        BLOCK_D=triton.next_power_of_2(D),
    )
    return norm


def cosine_arguments(image: Tensor, text: Tensor, image_norm: Tensor, text_norm: Tensor) -> dict[str, Any]:
    """Arguments that every kernel with a `cosine_tile` takes; image and text have contiguous rows."""
    return dict(
        image_ptr=image,
        text_ptr=text,
        image_norm_ptr=image_norm,
        text_norm_ptr=text_norm,
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
    # On the CPU, where the kernels run only to be checked (interpreter, simulator), `mm` has no out_dtype.
    if factors.dtype == torch.float32 or factors.device.type == "cpu":
        return factors.float() @ rows.float()
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


def check_class_ids(name: str, class_ids: Tensor, C: int) -> None:
    """Refuse what the C++ kernels refuse."""
    if class_ids.amin() < 0 or class_ids.amax() >= C:
        raise ValueError(f"{name}: class_ids must be rows of text, 0 to {C - 1}; got {class_ids.tolist()}.")
    if class_ids.unique().numel() != class_ids.numel():
        raise ValueError(f"{name}: class_ids must have no duplicates; got {class_ids.tolist()}.")
