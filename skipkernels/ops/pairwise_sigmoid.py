"""`pairwise_sigmoid`: sigmoid loss of all pairs of an image and a text.

    z_bn = s · ⟨x_b/|x_b|, t_n/|t_n|⟩ + β
    loss = Σ_b Σ_n log(1 + exp(−y_bn z_bn)),   y_bn = +1 for n = label_b, else −1
    d_z_bn = d_loss · −y_bn σ(−y_bn z_bn)

The loss is a sum over elements: unlike a softmax it needs no maximum of a row, and any block of images and texts is a
call of its own. Saved for backward: the inputs and the norms of the rows, [B] and [N]. Backward recomputes the logits
in panels, the rows of a bounded number of images.

On the CPU, gradients computed in forward save one matrix product of four. With `keep_…` the C++ kernel returns the
gradients of the unit rows as `kept_image` [B, D] and `kept_text` [N, D], without the factors logit_scale and d_loss,
and Σ d_z_bn · cosine_bn and Σ d_z_bn as `kept_sums` [2]. Other implementations allocate these, but neither write nor
read them.

On a GPU one kernel has both passes: a program computes a tile of logits, and stores its part of the loss, or of the
gradients. A second kernel adds the parts of the tiles in order, and the BLAS library multiplies panels of
d_z_bn/(|x_b| |t_n|) with the rows of text and image (unit_rows.py).

Source: Zhai et al., SigLIP, ICCV 2023, arXiv 2303.15343.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import registration, unit_rows
from .class_sampled_ce import GROUP, check_sample
from .launching import launch, tl, triton
from .unit_rows import Blocks, Panels, blocks_for, cosine_arguments, cosine_tile, total_of, with_contiguous_rows

NO_TEXT = -1  # label of an image without a text among these


class Inputs(NamedTuple):
    """Arguments of the forward operator."""

    image: Tensor
    text: Tensor
    labels: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    @property
    def differentiable(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inputs that may have a gradient."""
        return self.image, self.text, self.logit_scale, self.logit_bias


class Needs(NamedTuple):
    """Gradients to compute."""

    image: bool
    text: bool
    logit_scale: bool
    logit_bias: bool


@triton.jit
def _log1p_unit(x):
    """Compute log(1 + x) for x from 0 to 1, as 2 artanh(x/(2 + x)): small x keep their digits."""
    s = x / (2.0 + x)
    square = s * s  # s ≤ 1/3: the remainder after s¹³ is below 2⁻²⁵
    p = 1.0 / 13.0
    p = p * square + 1.0 / 11.0
    p = p * square + 1.0 / 9.0
    p = p * square + 1.0 / 7.0
    p = p * square + 1.0 / 5.0
    p = p * square + 1.0 / 3.0
    p = p * square + 1.0
    return 2.0 * s * p


@triton.jit
def _pairwise_sigmoid_kernel(
    image_ptr,
    text_ptr,
    labels_ptr,
    logit_scale_ptr,
    logit_bias_ptr,
    image_norm_ptr,
    text_norm_ptr,
    loss_ptr,
    factors_ptr,
    d_scale_ptr,
    d_bias_ptr,
    B,
    N,
    D,
    stride_image_b,
    stride_text_k,
    eps,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    MEASURE: tl.constexpr,
):
    """Σ log(1 + exp(−y z)), factor_bn = d_z_bn/(|x_b| |t_n|), Σ d_z cosine, Σ d_z; each if its pointer is not None.

    d_z has no factor d_loss. One program: a tile of BLOCK_B images and BLOCK_K texts; pointers of images point to the
    first one of a panel. With MEASURE it also stores the norms of the rows.
    """
    # Order programs so that those that run at the same time share rows: GROUP tiles of images per tile of texts.
    tile_b, tile_n = tl.swizzle2d(tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), GROUP)
    # 1. Cosines and norms
    offs_b = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = tile_n * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_b, mask_n = offs_b < B, offs_n < N
    rows_n = tl.minimum(offs_n, N - 1)
    cosine, image_norm, text_norm = cosine_tile(
        image_ptr=image_ptr,
        text_ptr=text_ptr,
        image_norm_ptr=image_norm_ptr,
        text_norm_ptr=text_norm_ptr,
        rows_b=tl.minimum(offs_b, B - 1),
        places_k=rows_n,
        rows_k=rows_n,
        D=D,
        stride_image_b=stride_image_b,
        stride_text_k=stride_text_k,
        eps=eps,
        BLOCK_B=BLOCK_B,
        BLOCK_K=BLOCK_K,
        BLOCK_D=BLOCK_D,
        PRECISION=PRECISION,
        MEASURE=MEASURE,
    )  # [BLOCK_B, BLOCK_K], [BLOCK_B], [BLOCK_K]
    if MEASURE:
        if tile_b == 0:
            tl.store(text_norm_ptr + offs_n, text_norm, mask=mask_n)  # [BLOCK_K]
        if tile_n == 0:
            tl.store(image_norm_ptr + offs_b, image_norm, mask=mask_b)  # [BLOCK_B]
    # 2. −y_bn z_bn, and e = exp(−|z_bn|), which does not overflow
    labels = tl.load(labels_ptr + offs_b, mask=mask_b, other=-1)  # [BLOCK_B]
    tl.device_assert((labels >= -1) & (labels < N), "pairwise_sigmoid: labels must be rows of text, or -1")
    hits = rows_n[None, :] == labels.to(tl.int32)[:, None]  # [BLOCK_B, BLOCK_K]
    z = tl.load(logit_scale_ptr).to(tl.float32) * cosine + tl.load(logit_bias_ptr).to(tl.float32)
    wrong = tl.where(hits, -z, z)  # [BLOCK_B, BLOCK_K]
    e = tl.exp(-tl.abs(z))  # [BLOCK_B, BLOCK_K]
    valid = mask_b[:, None] & mask_n[None, :]
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    # 3. The tile's part of the loss; NaN stays NaN in e
    if loss_ptr is not None:
        loss = tl.where(valid, tl.where(wrong > 0, wrong, 0.0) + _log1p_unit(e), 0.0)  # [BLOCK_B, BLOCK_K]
        tl.store(loss_ptr + place, tl.sum(tl.sum(loss, axis=1), axis=0))
    # 4. Factors of the matrix products, and the tile's parts of d_s and d_β
    d_logits = tl.where(wrong >= 0, 1.0, e) / (1.0 + e)
    d_logits = tl.where(valid, tl.where(hits, -d_logits, d_logits), 0.0)  # [BLOCK_B, BLOCK_K]
    if factors_ptr is not None:
        factors = d_logits / tl.maximum(image_norm, eps)[:, None] / tl.maximum(text_norm, eps)[None, :]
        factors_row = factors_ptr + offs_b.to(tl.int64)[:, None] * N
        tl.store(factors_row + offs_n[None, :], factors, mask=valid)  # [BLOCK_B, BLOCK_K]
    if d_scale_ptr is not None:
        tl.store(d_scale_ptr + place, tl.sum(tl.sum(d_logits * cosine, axis=1), axis=0))
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + place, tl.sum(tl.sum(d_logits, axis=1), axis=0))


def _launch_tiles(
    inputs: Inputs, norms: Sequence[Tensor], blocks: Blocks, *, measure: bool = False, **results: Tensor | None
) -> None:
    """Launch the kernel on images and all texts; `results` are the pointers that it writes through."""
    pointers: dict[str, Any] = dict.fromkeys(("loss_ptr", "factors_ptr", "d_scale_ptr", "d_bias_ptr"))
    image, text, labels, logit_scale, logit_bias = inputs
    B, N = image.shape[0], text.shape[0]
    launch(
        _pairwise_sigmoid_kernel,
        (triton.cdiv(N, blocks.BLOCK_K), triton.cdiv(B, blocks.BLOCK_B)),
        device=image.device,
        debug="loss_ptr" in results,  # in forward
        **blocks._asdict(),
        **cosine_arguments(image, text, *norms),
        **(pointers | results),
        labels_ptr=labels,
        logit_scale_ptr=logit_scale,
        logit_bias_ptr=logit_bias,
        B=B,
        N=N,
        GROUP=GROUP,
        MEASURE=measure,
    )


def _with_contiguous_rows(image: Tensor, text: Tensor, labels: Tensor, *numbers: Tensor) -> Inputs:
    return Inputs(with_contiguous_rows(image), with_contiguous_rows(text), labels.contiguous(), *numbers)


def _launch(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, keep = _with_contiguous_rows(*arguments[:5]), arguments[5:]
    image, text = inputs.image, inputs.text
    B, N, device = image.shape[0], text.shape[0], image.device
    blocks = blocks_for(B, image.dtype, device)
    measure, *norms = unit_rows.norms_for(image, text, None)
    tiles = triton.cdiv(B, blocks.BLOCK_B) * triton.cdiv(N, blocks.BLOCK_K)
    parts = torch.empty(tiles, dtype=torch.float32, device=device)
    _launch_tiles(inputs, norms, blocks, measure=measure, loss_ptr=parts)
    loss = total_of(parts, torch.empty((), dtype=torch.float32, device=device))
    return loss, *norms, *_unwritten(loss, image, N, keep)


def _launch_backward(d_loss: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = _with_contiguous_rows(*rest[:5]), Needs(*rest[10:])
    (image_norm, text_norm), (image, text, labels, *numbers) = rest[5:7], inputs
    B, N, device = image.shape[0], text.shape[0], image.device
    blocks = blocks_for(B, image.dtype, device)
    panels = Panels.of(B, N, blocks)
    # [panels, tiles]; zeros if the last panel may have fewer images and then does not write all elements.
    new = torch.zeros if panels.number > 1 else torch.empty
    d_scale, d_bias = (
        new(panels.number if need else 0, panels.tiles, dtype=torch.float32, device=device)
        for need in (needs.logit_scale, needs.logit_bias)
    )

    def write(number: int, images: slice, factors: Tensor | None) -> None:
        _launch_tiles(
            Inputs(image[images], text, labels[images], *numbers),
            (image_norm[images], text_norm),
            blocks,
            factors_ptr=factors,
            d_scale_ptr=d_scale[number] if needs.logit_scale else None,
            d_bias_ptr=d_bias[number] if needs.logit_bias else None,
        )

    sums = unit_rows.sums_by_panels(image, text, N, panels, needs[:2], write)
    rows = (
        unit_rows.through_unit_norm(x, None, of_x, inputs.logit_scale, d_loss) if need else x.new_empty(0)
        for x, of_x, need in zip((image, text), sums, needs[:2], strict=True)
    )
    totals = (
        total_of(parts, torch.empty_like(x), d_loss) if need else x.new_empty(0)
        for x, parts, need in zip(numbers, (d_scale, d_bias), needs[2:], strict=True)
    )
    return *rows, *totals


def _fallback(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, keep = Inputs(*arguments[:5]), arguments[5:]
    loss = reference.pairwise_sigmoid(*inputs)
    return (
        loss,
        *unit_rows.reference_norms(inputs.image, inputs.text, None),
        *_unwritten(loss, inputs.image, len(inputs.text), keep),
    )


def _fallback_backward(d_loss: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = Inputs(*rest[:5]), rest[10:]

    def forward(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        return reference.pairwise_sigmoid(image, text, inputs.labels, logit_scale, logit_bias)

    return registration.reference_gradients(forward, inputs.differentiable, needs, d_loss)


def _check(*arguments: Any) -> None:
    _, text, labels, logit_scale, logit_bias = arguments[:5]
    check_sample("pairwise_sigmoid", text, labels, logit_scale, None, NO_TEXT, "no text")
    if not logit_bias.isfinite().item():
        raise ValueError(f"pairwise_sigmoid: logit_bias must be finite; got {logit_bias.item()}.")


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    (image, text), keep = arguments[:2], arguments[5:]
    loss = image.new_empty((), dtype=torch.promote_types(image.dtype, torch.float32))
    norms = (loss.new_empty(x.shape[0]) for x in (image, text))
    return loss, *norms, *_unwritten(loss, image, text.shape[0], keep)


def _unwritten(loss: Tensor, image: Tensor, N: int, keep: tuple[bool, ...]) -> tuple[Tensor, Tensor, Tensor]:
    (B, D), (keep_image, keep_text, keep_sums) = image.shape, keep
    return (
        loss.new_empty(B if keep_image else 0, D),
        loss.new_empty(N if keep_text else 0, D),
        loss.new_empty(2 if keep_sums else 0, dtype=reference.accumulation_dtype(loss.device)),
    )


def _fake_backward(d_loss: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return registration.gradients_like(Inputs(*rest[:5]).differentiable, rest[10:])


_INPUTS = "Tensor image, Tensor text, Tensor labels, Tensor logit_scale, Tensor logit_bias"
_SAVED = "Tensor image_norm, Tensor text_norm, Tensor kept_image, Tensor kept_text, Tensor kept_sums"

pairwise_sigmoid = registration.define(
    f"pairwise_sigmoid({_INPUTS}, bool keep_image, bool keep_text, bool keep_sums) -> (Tensor loss, {_SAVED})",
    fallback=_fallback,
    launch=_launch,
    check=_check,
    fake=_fake,
)
pairwise_sigmoid_backward = registration.define(
    f"pairwise_sigmoid_backward(Tensor d_loss, {_INPUTS}, {_SAVED},"
    " bool need_image, bool need_text, bool need_logit_scale, bool need_logit_bias)"
    " -> (Tensor d_image, Tensor d_text, Tensor d_logit_scale, Tensor d_logit_bias)",
    fallback=_fallback_backward,
    launch=_launch_backward,
    fake=_fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *saved)


def _backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return ()
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3, 4)]
    d_image, d_text, *d_numbers = pairwise_sigmoid_backward(d_loss, *ctx.saved_tensors, *needs)
    return d_image, d_text, None, *d_numbers


registration.differentiate(pairwise_sigmoid, _backward, _save)
registration.refuse_double_backward(pairwise_sigmoid_backward, instead="skipkernels.reference.pairwise_sigmoid")
registration.autocast_features(pairwise_sigmoid, features=2)
