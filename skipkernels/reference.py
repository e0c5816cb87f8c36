"""Every operator in plain PyTorch: the specification, the test oracle and the fallback in one.

Each function has the name, the arguments and the defaults of its operator. All of them run on any device, in fp64 as
well, and are differentiable by autograd unless they say otherwise. Where the inputs are fp16 or bf16 the arithmetic is
done in fp32, as the kernels do it.

Shapes: B images, C classes, K classes kept in this step, D width of the joint embedding, W width of a tower, N image
tokens, P tokens of the shared prompt prefix, S tokens of the longest class suffix, H heads, E = W/H the width of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "UNIT_NORM_EPS",
    "add_layer_norm",
    "class_sampled_ce",
    "class_sampled_logits",
    "class_scores",
    "gather_rows",
    "mlp_activation",
    "pooled_attention",
    "sgd_momentum_",
    "suffix_attention",
]

UNIT_NORM_EPS = 1e-12
"""A row x is scaled to x / max(|x|, eps), as `torch.nn.functional.normalize` does. So a zero row stays zero, and its
gradient is that of x / eps: the incoming gradient times 1e12, nothing projected out."""


def class_sampled_ce(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    logit_scale: Tensor | float,
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

    The mean divides the sum by Σ_b w_y over the images that are not ignored. All of it is what
    `torch.nn.functional.cross_entropy` does to the gathered logits.

    Args:
        image: [B, D], image embeddings of any length.
        text: [C, D], the class bank, rows of any length.
        labels: int64 [B], rows of the bank, or `ignore_index`.
        logit_scale: the factor itself, not its logarithm: a number, or a tensor of one element.
        class_ids: int64 [K], the rows of the bank that take part, without duplicates; all of them by default.
        class_weight: [C], one weight for each row of the bank; 1 by default. No gradient flows to it.
        label_smoothing: ε in [0, 1].
        ignore_index: a label that stands for "no label": such an image has no loss and no gradient.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss: [] for "mean" and "sum", [B] for "none"; fp64 for fp64 features, else fp32.

    Raises:
        IndexError: if a label is no row of the bank, or not among `class_ids` (on a GPU: a device-side assertion).

    Source: Wu et al., Skip Tuning, arXiv 2412.11509, section 4.3 (class-wise skipping).

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])           # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # [C=3, D=2]
        >>> labels = torch.tensor([0, 1])
        >>> loss = class_sampled_ce(image, text, labels, 10.0, class_ids=torch.tensor([0, 1]))
        >>> print(f"{loss:.6f}")
        0.000045
    """
    logits = class_sampled_logits(image, text, logit_scale, class_ids)
    targets = torch.where(labels == ignore_index, -100, labels)
    if class_ids is not None:
        K = class_ids.shape[0]
        # K itself is out of range for cross_entropy, so a label that nobody sampled fails there.
        position = class_ids.new_full((text.shape[0],), K).scatter(0, class_ids, torch.arange(K, device=text.device))
        targets = torch.where(targets < 0, targets, position[targets.clamp_min(0)])
        class_weight = None if class_weight is None else class_weight[class_ids]
    weight = None if class_weight is None else class_weight.detach().to(logits.dtype)
    return F.cross_entropy(logits, targets, weight=weight, label_smoothing=label_smoothing, reduction=reduction)


def class_sampled_logits(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    class_ids: Tensor | None = None,
) -> Tensor:
    """Scaled cosines of images and a sample of the rows of a class bank.

        logits_bk = logit_scale · ⟨x_b/|x_b|, t_k/|t_k|⟩

    Args:
        image: [B, D], image embeddings of any length.
        text: [C, D], the class bank, rows of any length.
        logit_scale: the factor itself, not its logarithm: a number, or a tensor of one element.
        class_ids: int64 [K], the rows of the bank that take part; all of them by default.

    Returns:
        [B, K] logits: fp64 for fp64 features, else fp32 (at a scale of 100, bf16 logits are half a unit apart).

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [0.0, 2.0]])           # [B=2, D=2]
        >>> text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # [C=3, D=2]
        >>> class_sampled_logits(image, text, 10.0, class_ids=torch.tensor([0, 2]))
        tensor([[10.0000,  7.0711],
                [ 0.0000,  7.0711]])
    """
    rows = text if class_ids is None else text.index_select(0, class_ids)
    cosine = _unit_norm(image) @ _unit_norm(rows).T
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.reshape(()).to(cosine.dtype)
    return logit_scale * cosine


@torch.no_grad()
def class_scores(image: Tensor, prototypes: Tensor, labels: Tensor) -> Tensor:
    """Score of every class for a batch: its best cosine with an image; the classes in the batch come first of all.

        score_c = max_b ⟨x_b/|x_b|, p_c⟩,   score_c = +∞ where c is the label of an image

    Not differentiable: it selects.

    Args:
        image: [B, D], image embeddings of any length, B ≥ 1.
        prototypes: [C, D], one embedding per class, already of unit norm.
        labels: int64 [B], rows of `prototypes`.

    Returns:
        [C] scores: fp64 for fp64 features, else fp32.

    Raises:
        IndexError: if a label is no row of `prototypes` (on a GPU: a device-side assertion).

    Source: Wu et al., Skip Tuning, arXiv 2412.11509, section 4.3 (class-wise skipping).

    Example:
        >>> image = torch.tensor([[3.0, 0.0], [3.0, 4.0]])                # [B=2, D=2]
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])  # [C=3, D=2]
        >>> class_scores(image, prototypes, torch.tensor([0, 0]))
        tensor([    inf,  0.8000, -0.6000])
    """
    scores = (_unit_norm(image) @ _wide(prototypes).T).amax(dim=0)
    scores[labels] = math.inf
    return scores


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Residual addition and LayerNorm of the sum.

        hidden = x + residual,   normed = (hidden − mean(hidden)) / sqrt(var(hidden) + eps) · weight + bias

    Args:
        x: [..., W], what the sub-layer gave.
        residual: [..., W], what it was given; or None, which makes it a plain LayerNorm of x.
        weight: [W].
        bias: [W].
        eps: added to the variance.

    Returns:
        `hidden` and `normed`, both [..., W] in the dtype of `x`; statistics in fp32 (fp64 for fp64). `normed` is that
        of the sum as rounded to the dtype of `x`. Without a residual `hidden` is `x` itself.
        A row whose variance overflows in that dtype is what `torch.nn.functional.layer_norm` makes of it: NaN or 0,
        depending on the width. The operator returns NaN.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 2.0]])                 # [1, W=4]
        >>> hidden, normed = add_layer_norm(x, x, torch.ones(4), torch.zeros(4))
        >>> hidden, normed
        (tensor([[2., 4., 6., 4.]]), tensor([[-1.4142,  0.0000,  1.4142,  0.0000]]))
    """
    hidden = x if residual is None else x + residual
    wide = _wide(hidden)
    normed = F.layer_norm(wide, (wide.shape[-1],), weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return hidden, normed.to(hidden.dtype)


def mlp_activation(x: Tensor, bias: Tensor | None = None, kind: str = "quick_gelu") -> Tensor:
    """Bias and activation of a CLIP block's MLP.

    With u = x + bias: `quick_gelu` is u · σ(1.702 u), `gelu` is u · Φ(u), `gelu_tanh` is the tanh form of the latter.

    Args:
        x: [..., W], before the bias.
        bias: [W], or nothing to add.
        kind: "quick_gelu" (OpenAI's weights), "gelu" (exact) or "gelu_tanh".

    Returns:
        [..., W] in the dtype of `x`.

    Raises:
        ValueError: if `kind` is none of the three.

    Example:
        >>> mlp_activation(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1542,  0.0000,  0.8458])
        >>> mlp_activation(torch.tensor([-2.0, -1.0, 0.0]), bias=torch.ones(3), kind="gelu")
        tensor([-0.1587,  0.0000,  0.8413])
    """
    wide = _wide(x) if bias is None else _wide(x) + _wide(bias)
    if kind == "quick_gelu":
        activated = wide * torch.sigmoid(1.702 * wide)
    elif kind == "gelu":
        activated = F.gelu(wide)
    elif kind == "gelu_tanh":
        activated = F.gelu(wide, approximate="tanh")
    else:
        raise ValueError(f'mlp_activation: kind must be "quick_gelu", "gelu" or "gelu_tanh"; got {kind!r}.')
    return activated.to(x.dtype)


def suffix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    scale: float | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Causal attention of many short class suffixes over one prefix that they share, and over themselves.

    Token s of class k attends to the P tokens of the prefix and to tokens 0…s of its own suffix:

        out_ks = softmax_j(scale · ⟨q_ks, key_kj⟩, j ≤ P + s) · value_k,   key_k = [prefix_key; suffix_key_k]

    The gradient of the prefix is the sum over classes. Suffixes of one length are [K, S, …]. Others are packed, the
    tokens of all in a row, [T, …]: suffix k has the rows offsets[k] to offsets[k + 1], the end not included.

    Args:
        query: [K, S, H, E], or packed: [T, H, E].
        prefix_key: [P, H, E].
        prefix_value: [P, H, E].
        suffix_key: like `query`.
        suffix_value: like `query`.
        scale: 1/sqrt(E) by default.
        offsets: int64 [K + 1], from 0 to T, never falling, where suffixes are packed.
        max_length: of the longest suffix, given with `offsets`: nobody has to read them to know it.

    Returns:
        Like `query`.

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
    inputs = query, prefix_key, prefix_value, suffix_key, suffix_value
    return suffix_attention_and_lse(*inputs, scale, offsets, max_length)[0]


def suffix_attention_and_lse(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    suffix_key: Tensor,
    suffix_value: Tensor,
    scale: float | None = None,
    offsets: Tensor | None = None,
    max_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`suffix_attention`, and the log-sum-exp of the scores: `query` without its last dimension."""
    T = query.shape[0]
    if offsets is not None:
        assert max_length is not None
        padded = (padded_suffixes(x, offsets, max_length) for x in (query, suffix_key, suffix_value))
        query, suffix_key, suffix_value = padded
    K, S, H, E = query.shape
    P = prefix_key.shape[0]
    key = torch.cat([prefix_key.expand(K, P, H, E), suffix_key], dim=1)
    value = torch.cat([prefix_value.expand(K, P, H, E), suffix_value], dim=1)
    visible = torch.ones(S, P + S, dtype=torch.bool, device=query.device).tril(diagonal=P)
    out, lse = _attention(query, key, value, visible, scale)
    if offsets is not None:
        out, lse = packed_suffixes(out, offsets, T), packed_suffixes(lse, offsets, T)
    return out, lse


def padded_suffixes(packed: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    """[T, …] → [K, max_length, …], zeros behind each suffix."""
    rows = offsets[:-1, None] + torch.arange(max_length, device=offsets.device)
    padding = (rows >= offsets[1:, None]).view(*rows.shape, *[1] * (packed.dim() - 1))
    return packed[rows.clamp_max(packed.shape[0] - 1)].masked_fill(padding, 0)


def packed_suffixes(padded: Tensor, offsets: Tensor, T: int) -> Tensor:
    """[K, S, …] → [T, …], T the number of tokens without the padding."""
    rows = torch.arange(T, device=offsets.device)
    suffix = torch.searchsorted(offsets, rows, right=True) - 1
    return padded[suffix, rows - offsets[suffix]]


def pooled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query per sequence, that of the pooled token, over all keys of the sequence.

        out_b = softmax_n(scale · ⟨q_b, k_bn⟩, n < length_b) · v_bn

    Args:
        query: [B, H, E].
        key: [B, N, H, E].
        value: [B, N, H, E].
        lengths: int64 [B], how many keys count, at least 1; all N by default.
        scale: 1/sqrt(E) by default.

    Returns:
        [B, H, E] in the dtype of `query`.

    Example:
        >>> query = torch.zeros(1, 1, 1)                             # [B=1, H=1, E=1]: equal weights
        >>> value = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)   # [B=1, N=3, H=1, E=1]
        >>> pooled_attention(query, value, value).item()
        3.0
        >>> pooled_attention(query, value, value, lengths=torch.tensor([2])).item()
        1.5
    """
    return pooled_attention_and_lse(query, key, value, lengths, scale)[0]


def pooled_attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`pooled_attention`, and the log-sum-exp of the scores, [B, H]."""
    visible = None
    if lengths is not None:
        visible = torch.arange(key.shape[1], device=key.device) < lengths[:, None]
        # Zero keys and values as well as weights: 0 · NaN is NaN.
        key, value = (x.masked_fill(~visible[:, :, None, None], 0) for x in (key, value))
        visible = visible[:, None, None]
    out, lse = _attention(query[:, None], key, value, visible, scale)
    return out.squeeze(1), lse.squeeze(1)


@torch.no_grad()
def gather_rows(
    rows: Tensor,
    index: Tensor,
    token_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    pin_memory: bool = False,
) -> Tensor:
    """A batch of cached features: rows of a store, dequantised.

        out_b = rows[index_b] · token_scale[index_b]

    Not differentiable: the cache is a constant.

    Args:
        rows: [R, N, W], one row of features per sample; fp32, fp16, bf16, fp64, or int8.
        index: int64 [B], which rows, in any order, with or without repeats.
        token_scale: [R, N], what one step of int8 is worth, one for each token; required for int8 and only there.
        dtype: that of the result; by default that of `rows`, and fp32 for int8.
        pin_memory: put the result in page-locked memory, so that it can go to a GPU on a side stream.

    Returns:
        [B, N, W].

    Raises:
        ValueError: if `token_scale` is missing for int8 rows, or given for others.

    Example:
        >>> rows = torch.tensor([[[1, 2]], [[3, 4]]], dtype=torch.int8)   # [2, N=1, W=2]
        >>> gather_rows(rows, torch.tensor([1, 1, 0]), token_scale=torch.tensor([[0.5], [2.0]])).flatten(1)
        tensor([[6.0000, 8.0000],
                [6.0000, 8.0000],
                [0.5000, 1.0000]])
    """
    quantised = rows.dtype == torch.int8
    if quantised != (token_scale is not None):
        raise ValueError(
            f"gather_rows: token_scale must be given for int8 rows and only for them; got rows of {rows.dtype} "
            f"{'without' if quantised else 'with'} token_scale."
        )
    out = rows.index_select(0, index)
    if token_scale is not None:
        out = out * token_scale.index_select(0, index).unsqueeze(-1)
    out = out.to(dtype or (torch.float32 if quantised else rows.dtype))
    return out.pin_memory() if pin_memory else out


@torch.no_grad()
def sgd_momentum_(
    weight: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    momentum_buffer: Tensor | Sequence[Tensor],
    lr: Tensor | float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: Tensor | int | None = None,
) -> None:
    """One step of SGD with momentum, in place.

        g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

    It is `torch.optim.SGD`'s step for a buffer that starts at zero. Every product and every sum is rounded by itself:
    the kernels give the same bits. A list of tensors is one tensor, cut in pieces.

    With a seed, bf16 weights are rounded at random, up with the probability of the part that is lost, so that updates
    smaller than half a step survive on average. Four elements share a hash: the random bits of element i, counted
    through the list, are bits 16 · (i mod 4) and the 15 above of splitmix64(seed, i div 4). They depend on nothing
    else, so that a step gives the same weights on any device and with any number of threads. Use another seed for
    every step.

    Args:
        weight: any shape, changed; or a list of such tensors.
        grad: the shape of `weight`, or a list as long.
        momentum_buffer: the shape of `weight`, changed, or a list as long; zeros before the first step.
        lr: learning rate: a number, or a tensor of one element.
        momentum: share of the buffer that stays.
        weight_decay: L2 penalty.
        seed: for stochastic rounding of bf16 weights: a number, or an int64 tensor of one element; rounded to nearest
            without it.

    Raises:
        TypeError: if there is a seed and the weights are not bf16.

    Example:
        >>> weight, buffer = torch.tensor([1.0]), torch.tensor([0.0])
        >>> for _ in range(2):
        ...     sgd_momentum_(weight, torch.tensor([0.5]), buffer, lr=0.1)
        >>> weight, buffer
        (tensor([0.8550]), tensor([0.9500]))
    """
    lists = ([x] if isinstance(x, Tensor) else x for x in (weight, grad, momentum_buffer))
    first = 0
    for w, g, b in zip(*lists, strict=True):
        if seed is not None and w.dtype != torch.bfloat16:
            raise TypeError(f"sgd_momentum_: seed is for bfloat16 weights; got {w.dtype}. Leave it out.")
        wide = _wide(w)
        rate = lr.reshape(()).to(wide.dtype) if isinstance(lr, Tensor) else lr
        buffer = momentum * b.to(wide.dtype) + (g.to(wide.dtype) + weight_decay * wide)
        updated = wide - rate * buffer
        b.copy_(buffer)
        w.copy_(updated if seed is None else _round_at_random(updated, seed, first))
        first += w.numel()


def _wide(x: Tensor) -> Tensor:
    """The dtype that arithmetic is done in: fp64 for fp64, fp32 for all else."""
    return x if x.dtype == torch.float64 else x.float()


def _unit_norm(x: Tensor) -> Tensor:
    return F.normalize(_wide(x), dim=-1, eps=UNIT_NORM_EPS)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of [B, queries, H, E] over [B, keys, H, E], and the lse of the scores, [B, queries, H]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Contiguous: matmul would copy k.mT to [E, keys], whose products BLAS libraries sum over E in one sequence.
    q, k, v = (_wide(x).transpose(1, 2).contiguous() for x in (query, key, value))  # [B, H, tokens, E]
    scores = scale * (q @ k.mT)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    out = (scores.softmax(dim=-1) @ v).transpose(1, 2).to(query.dtype)
    return out, scores.detach().double().logsumexp(dim=-1).transpose(1, 2)


def _round_at_random(x: Tensor, seed: Tensor | int, first: int) -> Tensor:
    """Round fp32 to bf16: add 16 random bits below the last one that stays, then cut."""
    i = torch.arange(first, first + x.numel(), device=x.device).view(x.shape)
    start = seed.reshape(()) if isinstance(seed, Tensor) else signed64(seed)
    bits = (i // 4 + 1) * signed64(0x9E3779B97F4A7C15) + start
    bits = (bits ^ _shift_right(bits, 30)) * signed64(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * signed64(0x94D049BB133111EB)
    bits = bits ^ _shift_right(bits, 31)
    noise = (bits >> (16 * (i % 4)) & 0xFFFF).to(torch.int32)
    rounded = ((x.contiguous().view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def signed64(value: int) -> int:
    """The signed number with the same 64 bits: PyTorch multiplies int64 modulo 2⁶⁴, as uint64 does."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 (`>>` copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
