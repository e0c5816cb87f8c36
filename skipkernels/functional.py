"""The operators as public functions: validate the inputs, then call the fastest kernel for their device.

A class bank is the matrix [C, D] of the embeddings of all classes, one row per class.

Shapes: B images, C classes, K classes kept in this step, D width of the joint embedding, W width of a tower; N image
tokens, P tokens of the shared prompt prefix, S tokens of a class suffix, H heads, E = W/H width of a head.

An unsupported or mismatched dtype raises a TypeError; a mismatched shape or device, or an invalid option, a ValueError.
Labels, indices and offsets out of range raise a ValueError on the CPU and fail a device assertion on a GPU, as a host
sync would stop it. So a `logit_scale` that is not finite is a ValueError, but gives NaN as a tensor on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import dtypes, reference
from .checks import (
    FEATURE_DTYPES,
    as_scalar,
    check_device,
    check_dtype,
    check_features,
    check_ids,
    check_like,
    check_shape,
    check_values,
)
from .ops.add_layer_norm import add_layer_norm as _add_layer_norm
from .ops.class_sampled_ce import REDUCTIONS
from .ops.class_sampled_ce import class_sampled_ce as _class_sampled_ce
from .ops.class_sampled_logits import class_sampled_logits as _class_sampled_logits
from .ops.class_scores import class_scores as _class_scores
from .ops.mlp_activation import KINDS
from .ops.mlp_activation import mlp_activation as _mlp_activation
from .ops.pooled_attention import pooled_attention as _pooled_attention
from .ops.registration import call_and_explain
from .ops.rotary_embedding import rotary_embedding as _rotary_embedding
from .ops.sgd_momentum import as_casts, check_update
from .ops.sgd_momentum import sgd_momentum_ as _sgd_momentum_
from .ops.shared_prefix_attention import shared_prefix_attention as _shared_prefix_attention

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "class_sampled_ce",
    "class_sampled_logits",
    "class_scores",
    "contrastive_loss",
    "mlp_activation",
    "rotary_embedding",
    "pairwise_sigmoid",
    "pairwise_sigmoid_loss",
    "pooled_attention",
    "shared_prefix_attention",
    "sgd_momentum_",
]

PAIRS_IN_MEMORY = 1 << 22  # logits of `pairwise_sigmoid`: 16 MiB in fp32


def class_sampled_ce(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
    *,
    class_ids: Tensor | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of images against a sample of the rows of a class bank.

    With z_bk = logit_scale · ⟨x_b/|x_b|, t_k/|t_k|⟩ over the sampled rows k of the bank, y_b the label, w the
    class weights and ε the smoothing:

        loss_b = (1 − ε) · w_y · (lse_b − z_by) + ε/K · Σ_k w_k · (lse_b − z_bk),   lse_b = log Σ_k exp(z_bk)

    This is `torch.nn.functional.cross_entropy` of the gathered logits, but the kernels never have all [B, K] logits in
    memory: at most 2²³ of them on the CPU and 2²⁴ on a GPU, or those of one tile of images, 16 on the CPU and 16 to 128
    on a GPU, whichever is more. The reference, which computes fp64 on a GPU, has all. Gradients flow to `image`, `text`
    (zero for rows outside the sample) and `logit_scale`.

    Args:
        image: [B, D] image embeddings of any norm, in fp32, bf16, fp16 or fp64. A row with a norm below 1e-12 is
            divided by 1e-12, as in `torch.nn.functional.normalize`. A row with a norm above 1.8e19, of which the square
            overflows fp32, has cosines of 0 or NaN.
        text: [C, D] class bank with rows of any norm, in the dtype of `image`.
        labels: int64 [B], indices of rows of the bank, each among `class_ids`, or `ignore_index`.
        logit_scale: factor of the cosines, not the logarithm of this factor: a number, or a tensor of one element on
            the device of `image`, which is not read on the host.
        class_ids: int64 [K], indices of the sampled rows of the bank, without duplicates; default: all rows.
        class_weight: [C], weight of each row of the bank, without gradient; default: 1 for all.
        label_smoothing: ε in [0, 1]; default: 0.
        ignore_index: images with this label have no loss and no gradient; default: -100.
        reduction: "mean" (the default: weighted by w_y, over the images that are not ignored), "sum" or "none".

    Returns:
        The loss: [] for "mean" and "sum", [B] for "none"; fp64 for fp64 features, else fp32.

    Source: Wu et al., Skip Tuning, arXiv 2412.11509, section 4.3 (class-wise skipping).

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])           # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # [C=3, D=2]
        >>> labels = torch.tensor([0, 1])
        >>> loss = class_sampled_ce(image, text, labels, 10.0, class_ids=torch.tensor([0, 1]))
        >>> print(f"{loss:.6f}")
        0.000045
    """
    name = "class_sampled_ce"
    check_features(name, "image", image, B=None, D=None)
    check_like(name, "text", text, ("image", image), C=None, D=image.shape[1])
    check_ids(name, "labels", labels, ("image", image), B=image.shape[0])
    if class_ids is not None:
        check_ids(name, "class_ids", class_ids, ("image", image), K=None)
    if class_weight is not None:
        check_features(name, "class_weight", class_weight, ("text", text), C=text.shape[0])
        if class_weight.requires_grad:
            raise ValueError(
                f"{name}: class_weight is a constant; got one that requires grad. Use class_weight.detach()."
            )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1]; got {label_smoothing}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f'{name}: reduction must be "mean", "sum" or "none"; got {reduction!r}.')
    scale = as_scalar(name, "logit_scale", logit_scale, ("image", image), dtypes.wide_dtype(image.dtype))
    # On the CPU, gradients cost less if forward computes them with the loss. Those of "none" depend on d_loss [B].
    in_forward = image.device.type == "cpu" and reduction != "none" and torch.is_grad_enabled()
    return call_and_explain(
        _class_sampled_ce,
        image,
        text,
        labels,
        scale,
        class_ids,
        class_weight,
        label_smoothing,
        ignore_index,
        REDUCTIONS.index(reduction),
        *(in_forward and x.requires_grad for x in (image, text, scale)),
    )[0]


def class_sampled_logits(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    class_ids: Tensor | None = None,
) -> Tensor:
    """Scaled cosines of images and a sample of the rows of a class bank.

        logits_bk = logit_scale · ⟨x_b/|x_b|, t_k/|t_k|⟩

    Arguments and gradients are those of `class_sampled_ce`.

    Returns:
        [B, K] logits: fp64 for fp64 features, else fp32, because bf16 logits near 100 have steps of 0.5.

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])           # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # [C=3, D=2]
        >>> class_sampled_logits(image, text, 10.0, class_ids=torch.tensor([0, 2]))
        tensor([[10.0000,  7.0711],
                [ 0.0000,  7.0711]])
    """
    name = "class_sampled_logits"
    check_features(name, "image", image, B=None, D=None)
    check_like(name, "text", text, ("image", image), C=None, D=image.shape[1])
    if class_ids is not None:
        check_ids(name, "class_ids", class_ids, ("image", image), K=None)
    scale = as_scalar(name, "logit_scale", logit_scale, ("image", image), dtypes.wide_dtype(image.dtype))
    return call_and_explain(_class_sampled_logits, image, text, scale, class_ids)[0]


def class_scores(image: Tensor, prototypes: Tensor, labels: Tensor | None = None) -> Tensor:
    """Score of every class for a batch: its highest cosine with an image, or infinity for the labels of the batch.

        score_c = max_b ⟨x_b/|x_b|, p_c⟩,   score_c = +∞ where c is the label of an image

    Not differentiable, because the scores only select classes.

    Args:
        image: [B, D] image embeddings of any norm, B ≥ 1, in fp32, bf16, fp16 or fp64.
        prototypes: [C, D] class embeddings of unit norm, in the dtype of `image`.
        labels: int64 [B], indices of rows of `prototypes`; default: none, and no score is infinite.

    Returns:
        [C] scores: fp64 for fp64 features, else fp32.

    Source: Wu et al., Skip Tuning, arXiv 2412.11509, section 4.3 (class-wise skipping).

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [3.0, 4.0]])                # [B=2, D=2]
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # [C=3, D=2]
        >>> class_scores(image, prototypes, torch.tensor([0, 0]))
        tensor([    inf,  0.8000, -0.6000])
    """
    name = "class_scores"
    check_features(name, "image", image, B=None, D=None)
    check_like(name, "prototypes", prototypes, ("image", image), C=None, D=image.shape[1])
    if labels is not None:
        check_ids(name, "labels", labels, ("image", image), B=image.shape[0])
    return call_and_explain(_class_scores, image, prototypes, labels)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and LayerNorm of the sum, in one pass.

        hidden = x + residual,   normed = (hidden − mean(hidden)) / sqrt(var(hidden) + eps) · weight + bias

    Saved for backward: `hidden`, which the model saves anyway, and two numbers per row. Autocast casts `x` and
    `residual`, not the weight and bias.

    Args:
        x: [..., W] residual stream, in fp32, bf16, fp16 or fp64.
        residual: [..., W] output of the sub-layer, which is added to it, in the dtype of `x`, or in bf16 or fp16 if `x`
            is fp32; None for a plain LayerNorm of `x`.
        weight: [W], in any of the dtypes listed for `x`; usually fp32, also with bf16 features.
        bias: [W], in the dtype of `weight`.
        eps: added to the variance, at least 0; default: 1e-5.
        out_dtype: dtype of `normed`, any of the dtypes listed for `x`; default: the dtype of `x`.

    Returns:
        `hidden` (without a residual `x` itself) and `normed`, both [..., W]. `normed` is computed from the rounded
        `hidden`, with statistics in fp32 (fp64 for fp64), and rounded once; NaN where the variance of a row overflows.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 2.0]])                 # [1, W=4]
        >>> hidden, normed = add_layer_norm(x, x, torch.ones(4), torch.zeros(4))
        >>> hidden, normed
        (tensor([[2., 4., 6., 4.]]), tensor([[-1.4142,  0.0000,  1.4142,  0.0000]]))
    """
    name = "add_layer_norm"
    _check_norm(name, x, residual, weight, eps, out_dtype)
    check_like(name, "bias", bias, ("weight", weight))
    hidden, normed, _, _ = _add_layer_norm(x, residual, weight, bias, eps, out_dtype)
    return x if residual is None else hidden, normed


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMSNorm of the sum, in one pass: an option of the operator `add_layer_norm`.

        hidden = x + residual,   normed = hidden / sqrt(mean(hidden²) + eps) · weight

    Saved for backward: `hidden`, which the model saves anyway, and one number per row. Arguments and results are those
    of `add_layer_norm`, with `eps` added to the mean square; default: 1e-6.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, NeurIPS 2019, arXiv 1910.07467.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, -1.0, 2.0]])                # [1, W=4]
        >>> hidden, normed = add_rms_norm(x, x, torch.ones(4))
        >>> hidden, normed
        (tensor([[ 0.,  2., -2.,  4.]]), tensor([[ 0.0000,  0.8165, -0.8165,  1.6330]]))
    """
    _check_norm("add_rms_norm", x, residual, weight, eps, out_dtype)
    hidden, normed, _, _ = _add_layer_norm(x, residual, weight, None, eps, out_dtype, True)
    return x if residual is None else hidden, normed


def _check_norm(
    name: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype | None
) -> None:
    check_features(name, "x", x, rest=None, W=None)
    if residual is not None:
        check_like(name, "residual", residual, ("x", x), narrower=True)
    check_features(name, "weight", weight, ("x", x), W=x.shape[-1])
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name}: eps must be finite and at least 0; got {eps}.")
    if out_dtype is not None and out_dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name}: out_dtype must be float32, bfloat16, float16 or float64; got {out_dtype}.")


def mlp_activation(x: Tensor, bias: Tensor | None = None, kind: str = "quick_gelu") -> Tensor:
    """Bias and activation of the MLP of a block, in one pass.

    With u = x + bias: `quick_gelu` is u · σ(1.702 u), `gelu` is u · Φ(u), `gelu_tanh` is the tanh approximation of
    `gelu`. `swiglu` is silu(u[..., :W]) · u[..., W:] with silu(u) = u · σ(u), half as wide as `x`.

    Saved for backward: `x` and `bias`. Autocast casts `x`, not the bias.

    Args:
        x: [..., W], for `swiglu` [..., 2W], before the bias, in fp32, bf16, fp16 or fp64.
        bias: [W], for `swiglu` [2W], in any of these dtypes; default: None, no bias.
        kind: "quick_gelu" (default, as in OpenAI's CLIP), "gelu" (exact), "gelu_tanh" or "swiglu" (gate first).

    Returns:
        [..., W] in the dtype of `x`; computed in fp32 (fp64 for fp64).

    Example:
        >>> mlp_activation(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1542,  0.0000,  0.8458])
        >>> mlp_activation(torch.tensor([-2.0, -1.0, 0.0]), bias=torch.ones(3), kind="gelu")
        tensor([-0.1587,  0.0000,  0.8413])
        >>> mlp_activation(torch.tensor([0.0, 1.0, 5.0, 2.0]), kind="swiglu")
        tensor([0.0000, 1.4621])
    """
    name = "mlp_activation"
    check_features(name, "x", x, rest=None, W=None)
    if bias is not None:
        check_features(name, "bias", bias, ("x", x), W=x.shape[-1])
    if kind not in KINDS:
        raise ValueError(f'{name}: kind must be "quick_gelu", "gelu", "gelu_tanh" or "swiglu"; got {kind!r}.')
    if kind == "swiglu" and x.shape[-1] % 2 != 0:
        raise ValueError(f'{name}: x must be [..., 2W] with kind "swiglu", gate first; got {list(x.shape)}.')
    return _mlp_activation(x, bias, KINDS.index(kind))


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, *, heads: int, interleaved: bool = True) -> Tensor:
    """Rotary position embedding: rotate pairs of columns of each head by angles of the position of the row.

        out_1 = x_1 · cos − x_2 · sin,   out_2 = x_2 · cos + x_1 · sin

    A pair x_1, x_2 is columns 2i and 2i + 1 of a head, or with `interleaved=False` columns i and i + E/2. Heads behind
    the first `heads`, such as values beside query and key, are copied. Saved for backward: `cos` and `sin`. Autocast
    casts `x`, not the angles.

    Args:
        x: [R, W], heads of width E side by side, for one or more sequences of T rows; in fp32, bf16, fp16 or fp64.
        cos: [T, E/2], cosine of the angle of each pair at each position, in fp32, or fp64 for fp64; a constant. A
            position with cosines 1 and sines 0 is not rotated.
        sin: [T, E/2], sines, in the dtype of `cos`.
        heads: number of heads that are rotated, 1 to W/E.
        interleaved: pairs are neighbours (default: as in timm, EVA-02 and PE-Core), or columns of the two halves.

    Returns:
        [R, W] in the dtype of `x`; computed in fp32 (fp64 for fp64).

    Source: Su et al., RoFormer, arXiv 2104.09864.

    Example:
        >>> x = torch.tensor([[1.0, 0.0, 5.0, 6.0], [1.0, 0.0, 5.0, 6.0]])  # [R=2, W=4]: two heads with E = 2
        >>> cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])  # [T=2, E/2=1]: 0 and 90 degrees
        >>> rotary_embedding(x, cos, sin, heads=1)
        tensor([[1., 0., 5., 6.],
                [0., 1., 5., 6.]])
    """
    name = "rotary_embedding"
    check_shape(name, "cos", cos, **{"T": None, "E/2": None})
    check_dtype(name, "x", x, FEATURE_DTYPES, "Convert it first.")
    angle_dtype = dtypes.wide_dtype(x.dtype)
    check_dtype(name, "cos", cos, [angle_dtype], f"Use cos.to({angle_dtype}).")
    check_device(name, "cos", cos, ("x", x))
    check_like(name, "sin", sin, ("cos", cos))
    T, E = cos.shape[0], 2 * cos.shape[1]
    if x.dim() != 2 or x.shape[0] % T != 0 or x.shape[1] % E != 0 or x.shape[1] == 0:
        raise ValueError(
            f"{name}: x must be [R, W] with R a multiple of T={T} and W of E={E} to match cos {list(cos.shape)}; got "
            f"{list(x.shape)}."
        )
    if not 1 <= heads <= x.shape[1] // E:
        raise ValueError(f"{name}: heads must be 1 to {x.shape[1] // E}, with x {list(x.shape)}; got {heads}.")
    return _rotary_embedding(x, cos, sin, heads, interleaved, False)


def shared_prefix_attention(
    packed: Tensor,
    *,
    heads: int,
    prefix_length: int,
    max_length: int,
    offsets: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention over prompts that share a prefix, computed once for the prefix, then for each suffix.

    Rows are the P tokens of the prefix, then the tokens of each suffix. A token of the prefix attends to the prefix up
    to itself; a token of a suffix to the whole prefix and to its own suffix up to itself. With V_i the set of tokens
    that token i attends to:

        out_i = Σ_j weight_ij v_j,   weight_ij = softmax_j(scale · ⟨q_i, k_j⟩),   j ∈ V_i

    This is causal attention over every prompt, without a copy of the prefix for each class. The gradient of the prefix
    is the sum over classes, in an order that depends only on the shapes.

    Args:
        packed: [R, 3W], query, key and value of each token side by side, each of H heads; in fp32, bf16, fp16 or fp64.
            Not copied if its last dimension is contiguous.
        heads: H, a divisor of W.
        prefix_length: P, number of tokens of the prefix, 0 to R − 1.
        max_length: without `offsets`, the number of tokens of every suffix, a divisor of R − P. With `offsets`, an
            upper bound of the number of tokens of a suffix.
        offsets: int64 [K + 1], non-decreasing from 0 to at most R − P: suffix k is rows P + offsets[k] to
            P + offsets[k + 1] − 1. Rows behind the last suffix are not read; their result and gradient are 0.
            Default: suffixes of equal length.
        scale: factor of the products; default: 1/sqrt(W/H).

    Returns:
        Contiguous [R, W] tensor in the dtype of `packed`.

    Example:
        >>> value = torch.tensor([1.0, 2.0, 3.0, 9.0])  # a prefix of two tokens, two suffixes of one token
        >>> packed = torch.stack([torch.zeros(4), torch.zeros(4), value], dim=1)  # [R=4, 3W=3]: equal weights
        >>> shared_prefix_attention(packed, heads=1, prefix_length=2, max_length=1).flatten()
        tensor([1.0000, 1.5000, 2.0000, 4.0000])
        >>> offsets = torch.tensor([0, 2])  # one suffix of two tokens
        >>> shared_prefix_attention(packed, heads=1, prefix_length=2, max_length=2, offsets=offsets).flatten()
        tensor([1.0000, 1.5000, 2.0000, 3.7500])
    """
    name = "shared_prefix_attention"
    check_features(name, "packed", packed, **{"R": None, "3W": None})
    R, width = packed.shape
    if heads < 1 or width % (3 * heads) != 0:
        raise ValueError(f"{name}: heads must divide W, with packed [R, 3W]; got {heads} and {list(packed.shape)}.")
    if not 0 <= prefix_length < R:
        raise ValueError(f"{name}: prefix_length must be 0 to {R - 1}, with packed {[R, width]}; got {prefix_length}.")
    if max_length < 1:
        raise ValueError(f"{name}: max_length must be at least 1; got {max_length}.")
    if offsets is not None:
        check_dtype(name, "offsets", offsets, [torch.int64], "Use offsets.long().")
        if offsets.dim() != 1 or offsets.shape[0] < 2:
            raise ValueError(f"{name}: offsets must be [K + 1] with K ≥ 1; got {list(offsets.shape)}.")
        check_device(name, "offsets", offsets, ("packed", packed))
        max_length = min(max_length, R)
    elif (R - prefix_length) % max_length != 0:
        raise ValueError(
            f"{name}: max_length must divide the {R - prefix_length} rows behind the prefix; got {max_length}. "
            "Pass offsets if the suffixes differ in length."
        )
    scale = (width // (3 * heads)) ** -0.5 if scale is None else scale
    return call_and_explain(_shared_prefix_attention, packed, heads, prefix_length, offsets, max_length, scale)[0]


def pooled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query per sequence, the query of the pooled token, over all keys of the sequence.

        out_b = Σ_n weight_bn v_bn,   weight_bn = softmax_n(scale · ⟨q_b, k_bn⟩)

    Args:
        query: [B, H, E], in fp32, bf16, fp16 or fp64.
        key: [B, N, H, E] in the dtype of `query`. Views with gaps between heads or tokens, such as a part of a packed
            projection, are not copied.
        value: [B, N, H, E].
        scale: factor of the products; default: 1/sqrt(E).

    Returns:
        [B, H, E] in the dtype of `query`.

    Example:
        >>> query = torch.zeros(1, 1, 1)                             # [B=1, H=1, E=1]: equal weights
        >>> value = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)   # [B=1, N=3, H=1, E=1]
        >>> pooled_attention(query, value, value).item()
        3.0
    """
    name = "pooled_attention"
    check_features(name, "query", query, B=None, H=None, E=None)
    B, H, E = query.shape
    check_like(name, "key", key, ("query", query), B=B, N=None, H=H, E=E)
    check_like(name, "value", value, ("query", query), B=B, N=key.shape[1], H=H, E=E)
    return _pooled_attention(query, key, value, E**-0.5 if scale is None else scale)[0]


def sgd_momentum_(
    weight: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    momentum_buffer: Tensor | Sequence[Tensor],
    lr: Tensor | float,
    *,
    momentum: Tensor | float = 0.9,
    weight_decay: Tensor | float = 0.0,
    seed: Tensor | int | None = None,
    offsets: Sequence[int] | None = None,
    casts: Sequence[Tensor | None] | None = None,
) -> None:
    """One step of SGD with momentum, in place.

        g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

    This is the step of `torch.optim.SGD` for a buffer that starts at zero, in one pass over memory, bit-equal on all
    devices. Autograd does not record it. Pass the parameters of a model as lists: one call, on a GPU one launch,
    updates all of them. With a seed, bf16 weights are rounded at random, up with a probability equal to the truncated
    fraction, so that updates below half the spacing of bf16 numbers are applied on average.

    Args:
        weight: tensor of any shape, in fp32, bf16, fp16 or fp64, updated in place; or a list of such tensors of one
            dtype and device, which must not share memory.
        grad: tensor of the shape of `weight`, in any floating-point dtype; or a list of the same length.
        momentum_buffer: like `grad`, updated in place. Zeros before the first step.
        lr: learning rate: a number, or a tensor of one element on the device of `weight`, which the kernel reads, so
            that each replay of a captured CUDA graph uses its current value.
        momentum: decay of the buffer, at least 0; as `lr`; default: 0.9.
        weight_decay: L2 penalty, at least 0; as `lr`; default: 0.
        seed: seed of stochastic rounding of bf16 weights, a new one for every step: a number, or an int64 tensor of one
            element on the device of `weight`; default: None, round to nearest.
        offsets: index of the first element of each weight among all elements that share the seed, which determines its
            random bits; default: the weights follow each other in the order of the list.
        casts: copies of contiguous fp32 weights in bf16 or fp16, one dtype for all, which are overwritten with the new
            weights: a contiguous tensor of the shape of each weight, in memory of its own, or None; default: no copies.

    Example:
        >>> weight, buffer = torch.tensor([1.0]), torch.tensor([0.0])
        >>> for _ in range(2):
        ...     sgd_momentum_(weight, torch.tensor([0.5]), buffer, lr=0.1)
        >>> weight, buffer
        (tensor([0.8550]), tensor([0.9500]))
    """
    name = "sgd_momentum_"
    weights, grads, buffers = ([x] if isinstance(x, Tensor) else list(x) for x in (weight, grad, momentum_buffer))
    check_update(name, weights, grads, buffers, offsets)
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    for option, value in options.items():
        if not isinstance(value, Tensor) and not 0 <= value < math.inf:
            raise ValueError(f"{name}: {option} must be finite and at least 0; got {value}.")
    if not weights:
        return
    first = ("weight", weights[0])
    dtype = dtypes.accumulation_dtype(weights[0].device)
    rates = [as_scalar(name, option, value, first, dtype) for option, value in options.items()]
    if seed is not None:
        check_dtype(name, *first, [torch.bfloat16], "Leave out seed, which is for bfloat16.")
        number = seed if isinstance(seed, Tensor) else reference.signed64(seed)
        seed = as_scalar(name, "seed", number, first, torch.int64)
    given = [] if casts is None else as_casts(name, weights, casts)
    _sgd_momentum_(weights, grads, buffers, *rates, seed, offsets, given)


# ---- losses composed of operators ------------------------------------------------------------------------------------


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor | float, *, reduction: str = "mean") -> Tensor:
    """Symmetric contrastive loss of B pairs of an image and a text.

    With z_bc = logit_scale · ⟨x_b/|x_b|, t_c/|t_c|⟩ for images b and texts c of the batch:

        loss_b = ½ · (log Σ_c exp(z_bc) − z_bb) + ½ · (log Σ_c exp(z_cb) − z_bb)

    Computed by two calls of `class_sampled_ce`, without the [B, B] logits in memory. If two texts of a batch are equal,
    each is a negative for the image of the other.

    `image` and `text` are [B, D] embeddings of any norm, of which row b is a pair; the other arguments, the result and
    the gradients are those of `class_sampled_ce`.

    Source: Radford et al., CLIP, ICML 2021, arXiv 2103.00020, figure 3.

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])  # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [1.0, 1.0]])   # [B=2, D=2]
        >>> print(f"{contrastive_loss(image, text, 10.0):.4f}")
        0.1865
    """
    name = "contrastive_loss"
    check_features(name, "image", image, B=None, D=None)
    check_like(name, "text", text, ("image", image))
    labels = torch.arange(image.shape[0], device=image.device)
    image_to_text = class_sampled_ce(image, text, labels, logit_scale, reduction=reduction)
    return (image_to_text + class_sampled_ce(text, image, labels, logit_scale, reduction=reduction)) / 2


def pairwise_sigmoid(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    """Sigmoid loss of all pairs of B images and N texts, a block of the pairs of a batch.

    With z_bn = logit_scale · ⟨x_b/|x_b|, t_n/|t_n|⟩ + logit_bias:

        loss = −Σ_b Σ_n log σ(y_bn z_bn),   y_bn = +1 for n = labels_b, else −1

    The losses of blocks, as of several processes, add up to that of the batch; `pairwise_sigmoid_loss` is the mean over
    the images of one batch. Of more than 2²² pairs, the logits of a chunk of images at a time are in memory, and are
    computed again in backward. Gradients flow to `image`, `text`, `logit_scale` and `logit_bias`.

    Args:
        image: [B, D] image embeddings of any norm, as in `class_sampled_ce`.
        text: [N, D] text embeddings of any norm, in the dtype of `image`.
        labels: int64 [B], the text of each image as a row of `text`, or −1 if it is not among these.
        logit_scale: factor of the cosines, as in `class_sampled_ce`.
        logit_bias: bias of the logits: a number, or a tensor of one element on the device of `image`.

    Returns:
        [], the sum: fp64 for fp64 features, else fp32.

    Source: Zhai et al., SigLIP, ICCV 2023, arXiv 2303.15343.

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])           # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # [N=3, D=2]
        >>> whole = pairwise_sigmoid(image, text, torch.tensor([0, 2]), 10.0, -10.0)
        >>> first = pairwise_sigmoid(image, text[:2], torch.tensor([0, -1]), 10.0, -10.0)
        >>> second = pairwise_sigmoid(image, text[2:], torch.tensor([-1, 0]), 10.0, -10.0)
        >>> print(f"{whole:.4f} {first + second:.4f}")
        4.4195 4.4195
    """
    name = "pairwise_sigmoid"
    check_features(name, "image", image, B=None, D=None)
    check_like(name, "text", text, ("image", image), N=None, D=image.shape[1])
    check_ids(name, "labels", labels, ("image", image), B=image.shape[0])
    scale = as_scalar(name, "logit_scale", logit_scale, ("image", image), dtypes.wide_dtype(image.dtype))
    bias = as_scalar(name, "logit_bias", logit_bias, ("image", image), dtypes.wide_dtype(image.dtype))
    B, N = image.shape[0], text.shape[0]
    check_values(name, "labels", labels, (labels >= -1) & (labels < N), f"rows of text, 0 to {N - 1}, or no text (-1)")
    rows = max(1, PAIRS_IN_MEMORY // N)
    if rows >= B:
        return _sum_over_pairs(image, text, labels, scale, bias)
    # At least fp32, so that gradients of the text are not rounded to 16 bits before they are summed over the chunks.
    wide = dtypes.at_least_fp32(text)
    total = wide.new_zeros(())
    for chunk, own in zip(image.split(rows), labels.split(rows), strict=True):
        of_chunk = checkpoint(
            _sum_over_pairs, chunk, wide, own, scale, bias, use_reentrant=False, preserve_rng_state=False
        )
        total = total + of_chunk
    return total


def _sum_over_pairs(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute `pairwise_sigmoid` from the logits [B, N] of all pairs."""
    logits = class_sampled_logits(image, text.to(image.dtype), scale)
    logits = logits + bias.reshape(()).to(logits.dtype)
    own = labels[:, None] == torch.arange(text.shape[0], device=text.device)
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum()


def pairwise_sigmoid_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    """Sigmoid loss of B pairs of an image and a text, as of SigLIP.

    With z_bc = logit_scale · ⟨x_b/|x_b|, t_c/|t_c|⟩ + logit_bias for images b and texts c of the batch:

        loss = −1/B · Σ_b Σ_c log σ(y_bc z_bc),   y_bc = +1 for c = b, else −1

    One call of `pairwise_sigmoid`, which documents the arguments and gradients. `text` is [B, D], row b the text of
    image b; if two texts of a batch are equal, each is a negative for the image of the other.

    Source: Zhai et al., SigLIP, ICCV 2023, arXiv 2303.15343, algorithm 1.

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])  # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [1.0, 1.0]])   # [B=2, D=2]
        >>> print(f"{pairwise_sigmoid_loss(image, text, 10.0, -10.0):.4f}")
        1.8631
    """
    name = "pairwise_sigmoid_loss"
    check_features(name, "image", image, B=None, D=None)
    check_like(name, "text", text, ("image", image))
    labels = torch.arange(image.shape[0], device=image.device)
    return pairwise_sigmoid(image, text, labels, logit_scale, logit_bias) / image.shape[0]
