"""The operators as public functions: inputs checked, then handed to the fastest kernel for their device.

Shapes: B images, C classes, K classes kept in this step, D width of the joint embedding, W width of a tower; N image
tokens, P tokens of the shared prompt prefix, S tokens of a class suffix, H heads, E = W/H the width of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .checks import FEATURE_DTYPES, check_alike, check_device, check_dtype, check_one_dtype, check_shape
from .ops import registration
from .ops.add_layer_norm import add_layer_norm as _add_layer_norm
from .ops.class_sampled_ce import REDUCTIONS
from .ops.class_sampled_ce import class_sampled_ce as _class_sampled_ce
from .ops.class_sampled_logits import class_sampled_logits as _class_sampled_logits
from .ops.class_scores import class_scores as _class_scores
from .ops.gather_rows import gather_rows as _gather_rows
from .ops.gather_rows import gather_rows_out as _gather_rows_out
from .ops.mlp_activation import KINDS
from .ops.mlp_activation import mlp_activation as _mlp_activation
from .ops.pooled_attention import pooled_attention as _pooled_attention
from .ops.sgd_momentum import sgd_momentum_ as _sgd_momentum_
from .ops.suffix_attention import suffix_attention as _suffix_attention

__all__ = [
    "add_layer_norm",
    "class_sampled_ce",
    "class_sampled_logits",
    "class_scores",
    "mlp_activation",
    "pooled_attention",
    "suffix_attention",
    "gather_rows",
    "sgd_momentum_",
]


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

    With z_bk = logit_scale · ⟨x_b/|x_b|, t_k/|t_k|⟩ over the rows k of the bank that take part, y_b the label,
    w the class weights and ε the smoothing:

        loss_b = (1 − ε) · w_y · (lse_b − z_by) + ε/K · Σ_k w_k · (lse_b − z_bk),   lse_b = log Σ_k exp(z_bk)

    The same numbers as `torch.nn.functional.cross_entropy` gives for the gathered logits, but the [B, K] logits are
    never in memory as a whole: without gradients tiles of them are, with gradients a panel of some images at a time, of
    32 MiB or, where K is above half a million, of 16 images. Gradients flow to `image`, `text` (to the rows that took
    part; zero elsewhere) and `logit_scale`.

    Args:
        image: [B, D], image embeddings of any length, in fp32, bf16, fp16 or fp64. A row shorter than 1e-12 is divided
            by 1e-12 instead of its length, as `torch.nn.functional.normalize` does.
        text: [C, D] in the dtype of `image`, the class bank, rows of any length.
        labels: int64 [B], rows of the bank, or `ignore_index`.
        logit_scale: the factor itself, not its logarithm: a number, or a tensor of one element on the device of
            `image` (it is not read by the host).
        class_ids: int64 [K], the rows of the bank that take part, without duplicates; all of them by default.
        class_weight: [C], one weight for each row of the bank; 1 by default. A constant: no gradient flows to it.
        label_smoothing: ε in [0, 1].
        ignore_index: a label that stands for "no label": such an image has no loss and no gradient.
        reduction: "mean" (over the images that are not ignored, weighted by w_y), "sum" or "none".

    Returns:
        The loss: [] for "mean" and "sum", [B] for "none"; fp64 for fp64 features, else fp32.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or option that does not fit. On the CPU also for a label that is no row of the
            bank or not among `class_ids`, for `class_ids` out of range or with duplicates, and for a `logit_scale`
            that is not finite.

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
    _check_features(name, image, "text", text)
    _check_ids(name, "labels", labels, image, B=image.shape[0])
    if class_ids is not None:
        _check_ids(name, "class_ids", class_ids, image, K=None)
    if class_weight is not None:
        _check_class_weight(name, class_weight, text)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1]; got {label_smoothing}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f'{name}: reduction must be "mean", "sum" or "none"; got {reduction!r}.')
    scale = _scale_tensor(name, logit_scale, image)
    # On the CPU gradients cost less in the forward pass; with "none", what they are summed up with is not known there.
    keep = image.device.type == "cpu" and reduction != "none" and torch.is_grad_enabled()
    return registration.call(
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
        *(keep and x.requires_grad for x in (image, text, scale)),
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

    Args:
        image: [B, D], image embeddings of any length, in fp32, bf16, fp16 or fp64.
        text: [C, D] in the dtype of `image`, the class bank, rows of any length.
        logit_scale: the factor itself, not its logarithm: a number, or a tensor of one element on the device of
            `image`.
        class_ids: int64 [K], the rows of the bank that take part, without duplicates; all of them by default.

    Returns:
        [B, K] logits: fp64 for fp64 features, else fp32 (at a scale of 100, bf16 logits are half a unit apart).
        Gradients flow to `image`, `text` and `logit_scale`.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit; on the CPU also for `class_ids` out of range or with
            duplicates.

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])           # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # [C=3, D=2]
        >>> class_sampled_logits(image, text, 10.0, class_ids=torch.tensor([0, 2]))
        tensor([[10.0000,  7.0711],
                [ 0.0000,  7.0711]])
    """
    name = "class_sampled_logits"
    _check_features(name, image, "text", text)
    if class_ids is not None:
        _check_ids(name, "class_ids", class_ids, image, K=None)
    scale = _scale_tensor(name, logit_scale, image)
    return registration.call(_class_sampled_logits, image, text, scale, class_ids)[0]


def class_scores(image: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Score of every class for a batch: its best cosine with an image; the classes in the batch come first of all.

        score_c = max_b ⟨x_b/|x_b|, p_c⟩,   score_c = +∞ where c is the label of an image

    Not differentiable: it selects.

    Args:
        image: [B, D], image embeddings of any length, B ≥ 1, in fp32, bf16, fp16 or fp64.
        prototypes: [C, D] in the dtype of `image`, one embedding per class, already of unit norm.
        labels: int64 [B], rows of `prototypes`.

    Returns:
        [C] scores: fp64 for fp64 features, else fp32.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit; on the CPU also for a label that is no row of `prototypes`.

    Source: Wu et al., Skip Tuning, arXiv 2412.11509, section 4.3 (class-wise skipping).

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [3.0, 4.0]])                # [B=2, D=2]
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # [C=3, D=2]
        >>> class_scores(image, prototypes, torch.tensor([0, 0]))
        tensor([    inf,  0.8000, -0.6000])
    """
    name = "class_scores"
    _check_features(name, image, "prototypes", prototypes)
    _check_ids(name, "labels", labels, image, B=image.shape[0])
    return registration.call(_class_scores, image, prototypes, labels)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Residual addition and LayerNorm of the sum, in one pass.

        hidden = x + residual,   normed = (hidden − mean(hidden)) / sqrt(var(hidden) + eps) · weight + bias

    For backward it keeps `hidden`, which the model keeps anyway, and two numbers a row. Under autocast `x` and
    `residual` are cast, and the weight and bias are not.

    Args:
        x: [..., W], what the sub-layer gave, in fp32, bf16, fp16 or fp64.
        residual: like `x`, what the sub-layer was given; or None, which makes it a plain LayerNorm of x.
        weight: [W], in any of these dtypes: fp32 beside bf16 features is usual.
        bias: [W] in the dtype of `weight`.
        eps: added to the variance; at least 0.

    Returns:
        `hidden` and `normed`, both [..., W] in the dtype of `x`; statistics in fp32 (fp64 for fp64). `normed` is that
        of the sum as rounded to the dtype of `x`. Without a residual `hidden` is `x` itself, and
        is not cast under autocast.
        A row whose variance overflows in that dtype (in fp32, values around 1e19 and more) is NaN in `normed`, as are
        its gradients; `torch.nn.functional.layer_norm` returns NaN or 0 there, depending on the width.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 2.0]])                 # [1, W=4]
        >>> hidden, normed = add_layer_norm(x, x, torch.ones(4), torch.zeros(4))
        >>> hidden, normed
        (tensor([[2., 4., 6., 4.]]), tensor([[-1.4142,  0.0000,  1.4142,  0.0000]]))
    """
    name = "add_layer_norm"
    check_shape(name, "x", x, rest=None, W=None)
    check_dtype(name, "x", x, FEATURE_DTYPES, "Convert it first.")
    if residual is not None:
        check_alike(name, "residual", residual, ("x", x))
    check_shape(name, "weight", weight, ("x", x), W=x.shape[-1])
    check_dtype(name, "weight", weight, FEATURE_DTYPES, "Use weight.float().")
    check_device(name, "weight", weight, ("x", x))
    check_alike(name, "bias", bias, ("weight", weight))
    if not 0 <= eps < math.inf:
        raise ValueError(f"{name}: eps must be a number, at least 0; got {eps}.")
    hidden, normed, _, _ = _add_layer_norm(x, residual, weight, bias, eps)
    return x if residual is None else hidden, normed


def mlp_activation(x: Tensor, bias: Tensor | None = None, kind: str = "quick_gelu") -> Tensor:
    """Bias and activation of a CLIP block's MLP, in one pass.

    With u = x + bias: `quick_gelu` is u · σ(1.702 u), `gelu` is u · Φ(u), `gelu_tanh` is the tanh form of the latter.

    For backward it keeps `x` and `bias`, and computes the rest again. Under autocast `x` is cast and the bias is not.

    Args:
        x: [..., W], before the bias, in fp32, bf16, fp16 or fp64.
        bias: [W], in any of these dtypes; or None, nothing to add.
        kind: "quick_gelu" (OpenAI's weights), "gelu" (exact) or "gelu_tanh".

    Returns:
        [..., W] in the dtype of `x`; computed in fp32 (fp64 for fp64).

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or kind that does not fit.

    Example:
        >>> mlp_activation(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1542,  0.0000,  0.8458])
        >>> mlp_activation(torch.tensor([-2.0, -1.0, 0.0]), bias=torch.ones(3), kind="gelu")
        tensor([-0.1587,  0.0000,  0.8413])
    """
    name = "mlp_activation"
    check_shape(name, "x", x, rest=None, W=None)
    check_dtype(name, "x", x, FEATURE_DTYPES, "Convert it first.")
    if bias is not None:
        check_shape(name, "bias", bias, ("x", x), W=x.shape[-1])
        check_dtype(name, "bias", bias, FEATURE_DTYPES, "Use bias.float().")
        check_device(name, "bias", bias, ("x", x))
    if kind not in KINDS:
        raise ValueError(f'{name}: kind must be "quick_gelu", "gelu" or "gelu_tanh"; got {kind!r}.')
    return _mlp_activation(x, bias, KINDS.index(kind))


def suffix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    *,
    scale: float | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Causal attention of many short class suffixes over one prefix that they share, and over themselves.

    Token s of class k attends to the P tokens of the prefix and to tokens 0…s of its own suffix:

        out_ks = softmax_j(scale · ⟨q_ks, key_kj⟩, j ≤ P + s) · value_k,   key_k = [prefix_key; suffix_key_k]

    The prefix is never copied for each class, and its gradient is the sum over classes, in an order that depends on the
    shapes alone. Suffixes of one length are [K, S, …]. Others are packed, the tokens of all in a row, [T, …]: suffix k
    has the rows offsets[k] to offsets[k + 1], the end not included.

    Args:
        query: [K, S, H, E], or packed: [T, H, E]; in fp32, bf16, fp16 or fp64. Views with gaps between heads or tokens,
            such as a part of a packed projection, are read where they are.
        prefix_key: [P, H, E] in the dtype of `query`, P ≥ 1.
        prefix_value: [P, H, E].
        suffix_key: like `query`.
        suffix_value: like `query`.
        scale: of the products, 1/sqrt(E) by default.
        offsets: int64 [K + 1], from 0 to T, never falling, where suffixes are packed. On a GPU nobody reads it but the
            kernel, so nobody checks it.
        max_length: of the longest suffix, in tokens; required with `offsets`, and only there.

    Returns:
        Like `query`, contiguous.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or option that does not fit; on the CPU also for offsets that do not go from 0
            to T in steps of 0 to `max_length`.

    Example:
        >>> query = torch.zeros(2, 1, 1, 1)                    # [K=2, S=1, H=1, E=1]: equal weights
        >>> prefix = torch.tensor([1.0, 2.0]).view(2, 1, 1)    # [P=2, H=1, E=1]
        >>> suffix = torch.tensor([3.0, 6.0]).view(2, 1, 1, 1)
        >>> suffix_attention(query, prefix, prefix, suffix, suffix).flatten()
        tensor([2., 3.])
        >>> query, suffix = torch.zeros(3, 1, 1), torch.tensor([3.0, 6.0, 1.0]).view(3, 1, 1)  # [T=3, H=1, E=1]
        >>> offsets = torch.tensor([0, 1, 3])                  # suffixes of 1 and of 2 tokens
        >>> suffix_attention(query, prefix, prefix, suffix, suffix, offsets=offsets, max_length=2).flatten()
        tensor([2.0000, 3.0000, 2.5000])
    """
    name = "suffix_attention"
    sizes: dict[str, int | None] = dict.fromkeys("KSHE" if offsets is None else "THE")
    check_shape(name, "query", query, None, **sizes)
    check_dtype(name, "query", query, FEATURE_DTYPES, "Convert it first.")
    H, E = query.shape[-2:]
    _check_like(name, query, "prefix_key", prefix_key, P=None, H=H, E=E)
    _check_like(name, query, "prefix_value", prefix_value, P=prefix_key.shape[0], H=H, E=E)
    sizes = dict(zip(sizes, query.shape, strict=True))
    _check_like(name, query, "suffix_key", suffix_key, **sizes)
    _check_like(name, query, "suffix_value", suffix_value, **sizes)
    if (offsets is None) != (max_length is None):
        raise ValueError(
            f"{name}: offsets and max_length go together; got {'max_length' if offsets is None else 'offsets'} alone."
        )
    scale = E**-0.5 if scale is None else scale
    if offsets is not None and max_length is not None:
        _check_offsets(name, offsets, max_length, query)
        max_length = min(max_length, query.shape[0])
        return registration.call(
            _suffix_attention, query, prefix_key, prefix_value, suffix_key, suffix_value, offsets, max_length, scale
        )[0]
    q, k, v = (x.flatten(0, 1) for x in (query, suffix_key, suffix_value))
    out = registration.call(_suffix_attention, q, prefix_key, prefix_value, k, v, None, query.shape[1], scale)[0]
    return out.view(query.shape)


def pooled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query per sequence, that of the pooled token, over all keys of the sequence.

        out_b = softmax_n(scale · ⟨q_b, k_bn⟩, n < length_b) · v_bn

    Args:
        query: [B, H, E], in fp32, bf16, fp16 or fp64.
        key: [B, N, H, E] in the dtype of `query`. Views with gaps between heads or tokens, such as a part of a packed
            projection, are read where they are.
        value: [B, N, H, E].
        lengths: int64 [B], how many keys count, 1 to N; all N by default. On a GPU nobody reads it but the kernel, so
            nobody checks it.
        scale: of the products, 1/sqrt(E) by default.

    Returns:
        [B, H, E] in the dtype of `query`.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape or device that does not fit; on the CPU also for lengths that are not 1 to N.

    Example:
        >>> query = torch.zeros(1, 1, 1)                             # [B=1, H=1, E=1]: equal weights
        >>> value = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)   # [B=1, N=3, H=1, E=1]
        >>> pooled_attention(query, value, value).item()
        3.0
        >>> pooled_attention(query, value, value, lengths=torch.tensor([2])).item()
        1.5
    """
    name = "pooled_attention"
    check_shape(name, "query", query, B=None, H=None, E=None)
    check_dtype(name, "query", query, FEATURE_DTYPES, "Convert it first.")
    B, H, E = query.shape
    _check_like(name, query, "key", key, B=B, N=None, H=H, E=E)
    _check_like(name, query, "value", value, B=B, N=key.shape[1], H=H, E=E)
    if lengths is not None:
        check_dtype(name, "lengths", lengths, [torch.int64], "Use lengths.long().")
        check_shape(name, "lengths", lengths, ("query", query), B=B)
        check_device(name, "lengths", lengths, ("query", query))
    return registration.call(_pooled_attention, query, key, value, lengths, E**-0.5 if scale is None else scale)[0]


def gather_rows(
    rows: Tensor,
    index: Tensor,
    token_scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    pin_memory: bool = False,
    out: Tensor | None = None,
    out_index: Tensor | None = None,
) -> Tensor:
    """A batch of cached features: rows of a store, dequantised.

        out_b = rows[index_b] · token_scale[index_b], or with out_index: out[out_index_b] = …

    Every number is read once, where it is (a memory-mapped file will do), and written once. Not differentiable: the
    cache is a constant. From a store of several shards a batch is gathered shard by shard: `out_index` says which rows
    of the batch are those of a shard.

    Args:
        rows: [R, N, W], one row of features per sample; fp32, bf16, fp16, fp64, or int8.
        index: int64 [B], which rows, in any order, with or without repeats.
        token_scale: fp32 [R, N], what one step of int8 is worth, one for each token; required for int8 and only there.
        dtype: that of the result; by default that of `rows`, and fp32 for int8.
        pin_memory: put the result in page-locked memory, so that it can go to a GPU on a side stream.
        out: contiguous [B, N, W], where to put the result instead of new memory, not that of `rows`; its dtype counts.
            With `out_index` it is [M, N, W], M ≥ 1.
        out_index: int64 [B], the rows of `out` to write, in any order, none of them twice: on a GPU, where nobody
            looks, such a row would hold anything. The other rows keep what they hold. Only with `out`; by default 0 to
            B − 1.

    Returns:
        [B, N, W]: `out`, if there is one.

    Raises:
        TypeError: for a dtype that does not fit.
        ValueError: for a shape, device or option that does not fit, and, on the CPU, for an index that is no row, or an
            `out_index` that names a row twice; nothing is written then.

    Example:
        >>> rows = torch.tensor([[[1, 2]], [[3, 4]]], dtype=torch.int8)   # [R=2, N=1, W=2]
        >>> scale = torch.tensor([[0.5], [2.0]])                          # [R=2, N=1]
        >>> gather_rows(rows, torch.tensor([1, 1, 0]), scale).flatten(1)  # [B=3, N·W=2]
        tensor([[6.0000, 8.0000],
                [6.0000, 8.0000],
                [0.5000, 1.0000]])
        >>> batch = torch.zeros(3, 1, 2)                                  # [M=3, N=1, W=2]
        >>> other = torch.tensor([[[10.0, 20.0]]])                        # another shard, [R=1, N=1, W=2]
        >>> _ = gather_rows(rows, torch.tensor([1, 0]), scale, out=batch, out_index=torch.tensor([2, 0]))
        >>> gather_rows(other, torch.tensor([0]), out=batch, out_index=torch.tensor([1])).flatten(1)
        tensor([[ 0.5000,  1.0000],
                [10.0000, 20.0000],
                [ 6.0000,  8.0000]])
    """
    name = "gather_rows"
    check_shape(name, "rows", rows, R=None, N=None, W=None)
    check_dtype(name, "rows", rows, (*FEATURE_DTYPES, torch.int8), "Convert them first.")
    if index.dim() != 1 or index.numel() > 0:  # no rows at all is a batch, too
        check_shape(name, "index", index, B=None)
    check_dtype(name, "index", index, [torch.int64], "Use index.long().")
    check_device(name, "index", index, ("rows", rows))
    R, N, W = rows.shape
    if (rows.dtype == torch.int8) != (token_scale is not None):
        raise ValueError(
            f"{name}: token_scale must be given for int8 rows and only for them; got rows of {rows.dtype} "
            f"{'without' if token_scale is None else 'with'} token_scale."
        )
    if token_scale is not None:
        check_shape(name, "token_scale", token_scale, ("rows", rows), R=R, N=N)
        check_dtype(name, "token_scale", token_scale, [torch.float32], "Use token_scale.float().")
        check_device(name, "token_scale", token_scale, ("rows", rows))
    if dtype is not None and dtype not in FEATURE_DTYPES:
        raise TypeError(f"{name}: dtype must be float32, bfloat16, float16 or float64; got {dtype}.")
    if out is None:
        if out_index is not None:
            raise ValueError(f"{name}: out_index must come with out, whose rows it names; got no out. Pass it, too.")
        if pin_memory and (rows.device.type != "cpu" or not torch.cuda.is_available()):
            raise ValueError(
                f"{name}: pin_memory is for rows on the CPU of a machine with a GPU; got rows on {rows.device}"
                f"{'' if torch.cuda.is_available() else ' and no GPU'}. Leave it out."
            )
        return registration.call(_gather_rows, rows, index, token_scale, dtype, pin_memory)
    if dtype is not None or pin_memory:
        raise ValueError(f"{name}: dtype and pin_memory are those of out; got both. Leave them out.")
    B = index.shape[0]
    if out_index is not None:
        check_shape(name, "out_index", out_index, ("index", index), B=B)
        check_dtype(name, "out_index", out_index, [torch.int64], "Use out_index.long().")
        check_device(name, "out_index", out_index, ("rows", rows))
    right = out.shape[1:] == (N, W) and (out.shape[0] == B if out_index is None else out.shape[0] >= 1)
    if not right or not out.is_contiguous():
        wanted = f"[B={B}, N={N}, W={W}]" if out_index is None else f"[M, N={N}, W={W}] with M ≥ 1"
        raise ValueError(
            f"{name}: out must be contiguous {wanted}; got {list(out.shape)} with strides {list(out.stride())}."
        )
    check_dtype(name, "out", out, FEATURE_DTYPES, "Features are floating-point numbers.")
    check_device(name, "out", out, ("rows", rows))
    # In a graph that is being compiled nobody knows addresses.
    if not torch.compiler.is_compiling() and out.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr():
        raise ValueError(f"{name}: out must have memory of its own; got a view of that of rows.")
    registration.call(_gather_rows_out, rows, index, token_scale, out_index, out)
    return out


def sgd_momentum_(
    weight: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    momentum_buffer: Tensor | Sequence[Tensor],
    lr: Tensor | float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: Tensor | int | None = None,
) -> None:
    """One step of SGD with momentum, in place.

        g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

    It is `torch.optim.SGD`'s step for a buffer that starts at zero, in one pass over memory. As under `torch.no_grad`,
    nothing is recorded. No two of the tensors may share memory. Give the parameters of a
    model as lists: that is one call for all of them. Every number is rounded as in `skipkernels.reference`, to the
    same bits on any device and with any number of threads.

    With a seed, bf16 weights are rounded at random, up with the probability of the part that is lost, so that updates
    smaller than half a step survive on average. The random bits depend on the seed and on the place of a weight in the
    list, on nothing else. Use another seed for every step.

    Args:
        weight: any shape, in fp32, bf16, fp16 or fp64, changed; or a list of such tensors of one dtype and device.
        grad: the shape of `weight`, in any floating-point dtype; or a list as long.
        momentum_buffer: the shape of `weight`, in any floating-point dtype, changed; or a list as long. Zeros before
            the first step.
        lr: learning rate: a number, or a tensor of one element on the device of `weight`, which is read there: a
            captured CUDA graph takes what it holds at each replay.
        momentum: share of the buffer that stays, at least 0.
        weight_decay: L2 penalty, at least 0.
        seed: for stochastic rounding of bf16 weights: a number, or an int64 tensor of one element as `lr`. Without it
            they are rounded to nearest.

    Raises:
        TypeError: for a dtype that does not fit, and for a seed where weights are not bf16.
        ValueError: for a shape, device, length or rate that does not fit.

    Example:
        >>> weight, buffer = torch.tensor([1.0]), torch.tensor([0.0])
        >>> for _ in range(2):
        ...     sgd_momentum_(weight, torch.tensor([0.5]), buffer, lr=0.1)
        >>> weight, buffer
        (tensor([0.8550]), tensor([0.9500]))
    """
    name = "sgd_momentum_"
    weights, grads, buffers = ([x] if isinstance(x, Tensor) else list(x) for x in (weight, grad, momentum_buffer))
    if not len(weights) == len(grads) == len(buffers):
        raise ValueError(
            f"{name}: weight, grad and momentum_buffer must be lists of one length; got {len(weights)}, {len(grads)} "
            f"and {len(buffers)}."
        )
    for option, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: {option} must be at least 0; got {value}.")
    if not isinstance(lr, Tensor) and not 0 <= lr < float("inf"):
        raise ValueError(f"{name}: lr must be at least 0; got {lr}.")
    if not weights:
        return
    first = weights[0]
    check_dtype(name, "weight", first, FEATURE_DTYPES, "Only floating-point weights can be trained.")
    if seed is not None:
        check_dtype(name, "weight", first, [torch.bfloat16], "Leave out seed, which is for bfloat16.")
    dtype, device = first.dtype, first.device
    for i, (w, g, b) in enumerate(zip(weights, grads, buffers, strict=True)):
        if w.dtype != dtype or w.device != device:
            raise ValueError(
                f"{name}: the weights of a list must have one dtype and device; got {dtype} on {device} and {w.dtype} "
                f"on {w.device}. Make a call for each."
            )
        # A model has hundreds: most are done with one look.
        alike = g.shape == w.shape == b.shape and g.dtype == dtype == b.dtype and g.device == device == b.device
        if not (alike and g.layout == torch.strided == b.layout):
            for argument, x in (("grad", g), ("momentum_buffer", b)):
                if x.shape != w.shape:
                    raise ValueError(
                        f"{name}: {argument} must be {list(w.shape)} to match weight"
                        f"{f' number {i}' if len(weights) > 1 else ''}; got {list(x.shape)}."
                    )
                check_dtype(name, argument, x, FEATURE_DTYPES, f"Use {argument}.float().")
                check_device(name, argument, x, ("weight", w))
    lr = _number_tensor(name, "lr", lr, ("weight", first), FEATURE_DTYPES, torch.float64)
    if seed is not None:
        seed = seed if isinstance(seed, Tensor) else reference.signed64(seed)
        seed = _number_tensor(name, "seed", seed, ("weight", first), [torch.int64], torch.int64)
    _sgd_momentum_(weights, grads, buffers, lr, momentum, weight_decay, seed)


def _check_features(name: str, image: Tensor, bank_name: str, bank: Tensor) -> None:
    check_shape(name, "image", image, B=None, D=None)
    check_dtype(name, "image", image, FEATURE_DTYPES, "Convert it first.")
    check_shape(name, bank_name, bank, ("image", image), C=None, D=image.shape[1])
    check_one_dtype(name, bank_name, bank, ("image", image))
    check_device(name, bank_name, bank, ("image", image))


def _check_like(name: str, query: Tensor, argument: str, tensor: Tensor, **sizes: int | None) -> None:
    check_shape(name, argument, tensor, ("query", query), **sizes)
    check_one_dtype(name, argument, tensor, ("query", query))
    check_device(name, argument, tensor, ("query", query))


def _check_offsets(name: str, offsets: Tensor, max_length: int, query: Tensor) -> None:
    check_dtype(name, "offsets", offsets, [torch.int64], "Use offsets.long().")
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise ValueError(f"{name}: offsets must be [K + 1] with K ≥ 1; got {list(offsets.shape)}.")
    check_device(name, "offsets", offsets, ("query", query))
    if max_length < 1:
        raise ValueError(f"{name}: max_length must be at least 1; got {max_length}.")


def _check_ids(name: str, argument: str, ids: Tensor, image: Tensor, **size: int | None) -> None:
    check_dtype(name, argument, ids, [torch.int64], f"Use {argument}.long().")
    check_shape(name, argument, ids, ("image", image) if all(size.values()) else None, **size)
    check_device(name, argument, ids, ("image", image))


def _check_class_weight(name: str, class_weight: Tensor, text: Tensor) -> None:
    check_shape(name, "class_weight", class_weight, ("text", text), C=text.shape[0])
    check_dtype(name, "class_weight", class_weight, FEATURE_DTYPES, "Use class_weight.float().")
    if class_weight.requires_grad:
        raise ValueError(f"{name}: class_weight is a constant; got one that requires grad. Use class_weight.detach().")
    check_device(name, "class_weight", class_weight, ("text", text))


def _scale_tensor(name: str, logit_scale: Tensor | float, image: Tensor) -> Tensor:
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    return _number_tensor(name, "logit_scale", logit_scale, ("image", image), FEATURE_DTYPES, dtype)


def _number_tensor(
    name: str,
    argument: str,
    value: Tensor | float,
    like: tuple[str, Tensor],
    dtypes: Sequence[torch.dtype],
    dtype: torch.dtype,
) -> Tensor:
    """A number as a tensor on the device of another, without the host waiting for it: in `dtype`, or as it is given."""
    if not isinstance(value, Tensor):
        if dtype.is_floating_point and abs(value) > torch.finfo(dtype).max:  # a NaN is the kernel's to refuse
            value = math.copysign(math.inf, value)
        return torch.full((), value, dtype=dtype, device=like[1].device)
    if value.numel() != 1 or value.dim() > 1:
        raise ValueError(f"{name}: {argument} must be a number, [] or [1]; got {list(value.shape)}.")
    check_dtype(name, argument, value, dtypes, f"Use {argument}.to({dtype}).")
    check_device(name, argument, value, like)
    return value
