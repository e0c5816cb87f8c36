"""Tiles of cosines and their gradients, shared by the Triton kernels of the operators on unit rows.

    cosine_bk = ⟨x_b/|x_b|, t_k/|t_k|⟩
    d_x_b = s · (1 − u_b u_bᵀ) Σ_k G_bk t_k,   d_t_k = s · (1 − v_k v_kᵀ) Σ_b G_bk x_b,   G_bk = d_z_bk/(|x_b| |t_k|)

with u and v the unit rows. With both norms in the factors G, the sums are matrix products with the rows in memory:
`contract` calls the BLAS library, which fills a GPU at any shape. A Triton kernel would save no launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import dtypes, reference
from ..checks import check_values
from .launching import dot_precision, launch, launch_options, products_widen, tl, triton

# ---- cosines ---------------------------------------------------------------------------------------------------------


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
    """Compute cosines [BLOCK_B, BLOCK_K] of images and rows of the bank, and the norms of both."""
    # Callers repeat the last row past the end, since masks would cost registers. places_k are the positions of rows_k
    # in the sample.
    image_row = image_ptr + rows_b.to(tl.int64)[:, None] * stride_image_b  # [BLOCK_B, 1]
    text_row = text_ptr + rows_k.to(tl.int64)[None, :] * stride_text_k  # [1, BLOCK_K]
    product = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    if MEASURE:
        image_squares = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        text_squares = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    # 1. Products and, with MEASURE, squares. Norms divide the products: those of 16-bit numbers are exact in fp32.
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        image = tl.load(image_row + offs_d[None, :], mask=mask_d[None, :], other=0.0)  # [BLOCK_B, BLOCK_D]
        text = tl.load(text_row + offs_d[:, None], mask=mask_d[:, None], other=0.0)  # [BLOCK_D, BLOCK_K]
        # [BLOCK_B, BLOCK_D] @ [BLOCK_D, BLOCK_K] -> [BLOCK_B, BLOCK_K]
        product = tl.dot(image, text, product, input_precision=PRECISION)
        if MEASURE:
            image_squares += image.to(tl.float32) * image.to(tl.float32)
            text_squares += text.to(tl.float32) * text.to(tl.float32)
    # 2. Norms, and the products divided by them
    if MEASURE:
        image_norm = tl.sqrt(tl.sum(image_squares, axis=1))  # [BLOCK_B]
        text_norm = tl.sqrt(tl.sum(text_squares, axis=0))  # [BLOCK_K]
    else:
        image_norm = tl.load(image_norm_ptr + rows_b)  # [BLOCK_B]
        text_norm = tl.load(text_norm_ptr + places_k)  # [BLOCK_K]
    cosine = product / tl.maximum(image_norm, eps)[:, None] / tl.maximum(text_norm, eps)[None, :]  # [BLOCK_B, BLOCK_K]
    return cosine, image_norm, text_norm


def cosine_arguments(image: Tensor, text: Tensor, image_norm: Tensor, text_norm: Tensor) -> dict[str, Any]:
    """Arguments of kernels with a `cosine_tile`; image and text have contiguous rows."""
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


# ---- norms -----------------------------------------------------------------------------------------------------------


@triton.jit
def _row_norms_kernel(rows_ptr, ids_ptr, norm_ptr, C, D, stride_rows, BLOCK_D: tl.constexpr):
    """|x|. One program: one row, ids[i] or i; row 0 for ids out of range, which another kernel asserts."""
    pid = tl.program_id(0).to(tl.int64)
    row = pid
    if ids_ptr is not None:
        row = tl.load(ids_ptr + pid)
        row = tl.where((row >= 0) & (row < C), row, 0)
    offs_d = tl.arange(0, BLOCK_D)
    x = tl.load(rows_ptr + row * stride_rows + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # [BLOCK_D]
    tl.store(norm_ptr + pid, tl.sqrt(tl.sum(x * x, axis=0)))


def row_norms(rows: Tensor, ids: Tensor | None = None) -> Tensor:
    """Compute the norms of the rows, fp32 [n]."""
    n, D = sample_size(rows, ids), rows.shape[1]
    norm = torch.empty(n, dtype=torch.float32, device=rows.device)  # [n]
    launch(
        _row_norms_kernel,
        (n,),
        device=rows.device,
        **launch_options("row_norms", rows, D=D),
        rows_ptr=rows,
        ids_ptr=ids,
        norm_ptr=norm,
        C=rows.shape[0],
        D=D,
        stride_rows=rows.stride(0),
        BLOCK_D=triton.next_power_of_2(D),
    )
    return norm


def norms_for(image: Tensor, text: Tensor, class_ids: Tensor | None, measure: bool) -> tuple[Tensor, Tensor]:
    """Compute the norms of both, fp32 [B] and [K], or with `measure` allocate them for the kernel of the product.

    That kernel saves two launches, and needs more registers to compute them.
    """
    if not measure:
        return row_norms(image), row_norms(text, class_ids)
    sizes = image.shape[0], sample_size(text, class_ids)
    image_norm, text_norm = (torch.empty(n, dtype=torch.float32, device=image.device) for n in sizes)
    return image_norm, text_norm


def reference_norms(image: Tensor, text: Tensor, class_ids: Tensor | None) -> Iterator[Tensor]:
    """Yield the norms of images and sampled rows, in fp32 (fp64 for fp64), in plain PyTorch."""
    for rows in (image, reference.sampled(text, class_ids)):
        yield torch.linalg.vector_norm(rows, dim=1, dtype=dtypes.wide_dtype(image.dtype))


# ---- gradients -------------------------------------------------------------------------------------------------------


def factors_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a panel of factors; fp16 has too small a range for norms and small probabilities."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def contract(factors: Tensor, rows: Tensor) -> Tensor:
    """Compute factors · rows in fp32, [m, n] @ [n, D] -> [m, D]."""
    if factors.dtype == torch.float32 or not products_widen(factors.device.type):
        return factors.float() @ rows.float()
    return torch.mm(factors, rows, out_dtype=torch.float32)


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
    """d_x = s · factor/divisor · (sum − x · ⟨x, sum⟩/|x|²), without the projection if |x| < eps.

    One program: one row, ids[i] or without ids row i. A factor or divisor of None is 1.
    """
    pid = tl.program_id(0).to(tl.int64)
    row = pid
    if ids_ptr is not None:
        row = tl.load(ids_ptr + pid)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    # 1. Row, and its sum over the factors G
    x = tl.load(rows_ptr + row * stride_rows + offs_d, mask=mask_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    total = tl.load(sums_ptr + pid * D + offs_d, mask=mask_d, other=0.0)  # [BLOCK_D]
    # 2. Projection
    norm = tl.sqrt(tl.sum(x * x, axis=0))  # []
    unit = x / tl.maximum(norm, eps)  # [BLOCK_D]
    along = tl.where(norm < eps, 0.0, tl.sum(unit * total, axis=0))  # []
    factor = tl.load(scale_ptr).to(tl.float32) * _upstream(factor_ptr, divisor_ptr)
    tl.store(d_rows_ptr + row * stride_d_rows + offs_d, factor * (total - unit * along), mask=mask_d)  # [BLOCK_D]


def through_unit_norm(
    rows: Tensor,
    ids: Tensor | None,
    sums: Tensor,
    logit_scale: Tensor,
    factor: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of the rows from the sums over factors, [n, D]; 0 for rows that are not in ids."""
    D = rows.shape[1]
    d_rows = (torch.empty if ids is None else torch.zeros)(rows.shape, dtype=rows.dtype, device=rows.device)
    launch(
        _unit_rows_bwd_kernel,
        (sums.shape[0],),
        device=rows.device,
        **launch_options("unit_rows_bwd", rows, D=D),
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


@triton.jit
def _total_kernel(parts_ptr, factor_ptr, divisor_ptr, total_ptr, n, BLOCK: tl.constexpr):
    """factor/divisor · Σ of the parts, in order. A single program."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + offs, mask=offs < n, other=0.0).to(tl.float64)  # [BLOCK]
    tl.store(total_ptr, tl.sum(total, axis=0) * _upstream(factor_ptr, divisor_ptr))


def total_of(parts: Tensor, total: Tensor, factor: Tensor | None = None, divisor: Tensor | None = None) -> Tensor:
    """Write factor/divisor times the sum of fp32 parts to `total`, which has one element, and return it."""
    launch(
        _total_kernel,
        (1,),
        device=parts.device,
        parts_ptr=parts,
        factor_ptr=factor,
        divisor_ptr=divisor,
        total_ptr=total,
        n=parts.numel(),
        **launch_options("total", parts),
    )
    return total


@triton.jit
def _upstream(factor_ptr, divisor_ptr):
    """Compute factor/divisor; 1 for None."""
    factor = 1.0
    if factor_ptr is not None:
        factor = tl.load(factor_ptr).to(tl.float32)
    if divisor_ptr is not None:
        factor /= tl.load(divisor_ptr)
    return factor


# ---- sampled rows ----------------------------------------------------------------------------------------------------


def sample_size(text: Tensor, class_ids: Tensor | None) -> int:
    """Return K, the number of sampled rows."""
    return (text if class_ids is None else class_ids).shape[0]


def check_sample(name: str, image: Tensor, text: Tensor, logit_scale: Tensor, class_ids: Tensor | None) -> None:
    """Check the sampled rows, and on the CPU the scale; on a GPU a scale that is not finite gives NaN."""
    if logit_scale.device.type == "cpu":
        finite = logit_scale.to(dtypes.wide_dtype(image.dtype)).isfinite()
        check_values(name, "logit_scale", logit_scale, finite, "finite")
    if class_ids is not None:
        in_range = (class_ids >= 0) & (class_ids < len(text))
        check_values(name, "class_ids", class_ids, in_range, f"rows of text, 0 to {len(text) - 1}")
        ordered = class_ids.sort().values
        different = ordered[1:] != ordered[:-1]
        check_values(name, "class_ids", ordered[1:], different, "different rows of text", "Remove the duplicate.")
