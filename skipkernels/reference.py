"""Every operator in plain PyTorch: the specification, the test oracle and the fallback.

Each function has the name, the arguments and the defaults of the function in `skipkernels.functional`, where the
formulas, arguments and shapes are documented; options may also be positional here. Arguments are not validated, but an
index out of range raises an error, on a GPU a device-side assertion. All functions run on any device, also in fp64, and
are differentiable by autograd unless stated otherwise. For fp16 and bf16 inputs the arithmetic is in fp32, as in the
kernels, also under autocast.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import at_least_fp32, in_accumulation_dtype, without_autocast

__all__ = [
    "UNIT_NORM_EPS",
    "add_layer_norm",
    "add_rms_norm",
    "class_sampled_ce",
    "class_sampled_logits",
    "class_scores",
    "contrastive_loss",
    "mlp_activation",
    "pairwise_sigmoid",
    "pairwise_sigmoid_loss",
    "pooled_attention",
    "rotary_embedding",
    "sgd_momentum_",
    "shared_prefix_attention",
]

UNIT_NORM_EPS = 1e-12
"""A row x is scaled to x / max(|x|, eps), as in `torch.nn.functional.normalize`. A zero row stays zero; its gradient is
that of x / eps: the incoming gradient times 1e12, without projection."""


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
    """Cross-entropy of images against a sample of the rows of a class bank, see `functional.class_sampled_ce`."""
    logits = class_sampled_logits(image, text, logit_scale, class_ids)
    # Labels outside the bank or the sample get position K, for which cross_entropy raises an error.
    C, K = text.shape[0], logits.shape[1]
    position = torch.arange(K, device=text.device)  # [K]
    if class_ids is not None:
        position = class_ids.new_full((C,), K).scatter(0, class_ids, position)  # [C]
    targets = torch.where((labels >= 0) & (labels < C), position[labels.clamp(0, C - 1)], K)
    targets = torch.where(labels == ignore_index, -100, targets)
    weight = None if class_weight is None else sampled(class_weight, class_ids).detach().to(logits.dtype)
    return F.cross_entropy(logits, targets, weight=weight, label_smoothing=label_smoothing, reduction=reduction)


def class_sampled_logits(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    class_ids: Tensor | None = None,
) -> Tensor:
    """Scaled cosines of images and a sample of the rows of a class bank, see `functional.class_sampled_logits`."""
    with without_autocast(image.device):
        cosine = unit_norm(image) @ unit_norm(sampled(text, class_ids)).T
    if isinstance(logit_scale, Tensor):
        logit_scale = logit_scale.reshape(()).to(cosine.dtype)
    return logit_scale * cosine


@torch.no_grad()
def class_scores(image: Tensor, prototypes: Tensor, labels: Tensor | None = None) -> Tensor:
    """Score of every class for a batch, see `functional.class_scores`."""
    with without_autocast(image.device):
        scores = (unit_norm(image) @ at_least_fp32(prototypes).T).amax(dim=0)
    # Not scores[labels], for which −1 is the last class.
    return scores if labels is None else scores.scatter_(0, labels, math.inf)


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor | float, reduction: str = "mean") -> Tensor:
    """Symmetric contrastive loss of B pairs of an image and a text, see `functional.contrastive_loss`."""
    logits = class_sampled_logits(image, text, logit_scale)
    labels = torch.arange(logits.shape[0], device=logits.device)
    both = (F.cross_entropy(z, labels, reduction=reduction) for z in (logits, logits.T))
    return sum(both, start=logits.new_zeros(())) / 2


def pairwise_sigmoid(
    image: Tensor, text: Tensor, labels: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    """Sigmoid loss of all pairs of an image and a text, see `functional.pairwise_sigmoid`."""
    cosine = class_sampled_logits(image, text, 1.0)
    scale, bias = (x.reshape(()).to(cosine.dtype) if isinstance(x, Tensor) else x for x in (logit_scale, logit_bias))
    logits = scale * cosine + bias
    # Column 0 is for −1; a label outside the texts has no column.
    own = F.pad(torch.zeros_like(cosine, dtype=torch.bool), (1, 0)).scatter(1, labels[:, None] + 1, True)[:, 1:]
    return -F.logsigmoid(torch.where(own, logits, -logits)).sum()


def pairwise_sigmoid_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    """Sigmoid loss of B pairs of an image and a text, see `functional.pairwise_sigmoid_loss`."""
    labels = torch.arange(image.shape[0], device=image.device)
    return pairwise_sigmoid(image, text, labels, logit_scale, logit_bias) / image.shape[0]


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and LayerNorm of the sum, see `functional.add_layer_norm`.

    A row with a variance that overflows is NaN or 0, depending on the width, as in `torch.nn.functional.layer_norm`;
    the operator returns NaN.
    """
    hidden = x if residual is None else (x + residual).to(x.dtype)
    wide = at_least_fp32(hidden)
    normed = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return hidden, normed.to(out_dtype or hidden.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and RMSNorm of the sum, see `functional.add_rms_norm`."""
    hidden = x if residual is None else (x + residual).to(x.dtype)
    wide = at_least_fp32(hidden)
    normed = F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps)
    return hidden, normed.to(out_dtype or hidden.dtype)


def mlp_activation(x: Tensor, bias: Tensor | None = None, kind: str = "quick_gelu") -> Tensor:
    """Bias and activation of the MLP of a block, see `functional.mlp_activation`."""
    u = at_least_fp32(x) if bias is None else at_least_fp32(x) + at_least_fp32(bias)
    if kind == "quick_gelu":
        activated = u * torch.sigmoid(1.702 * u)
    elif kind == "gelu":
        activated = F.gelu(u)
    elif kind == "gelu_tanh":
        activated = F.gelu(u, approximate="tanh")
    elif kind == "swiglu":
        gate, linear = u.chunk(2, dim=-1)
        activated = F.silu(gate) * linear
    else:
        raise ValueError(f'mlp_activation: kind must be "quick_gelu", "gelu", "gelu_tanh" or "swiglu"; got {kind!r}.')
    return activated.to(x.dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, heads: int, interleaved: bool = True) -> Tensor:
    """Rotation of pairs of columns by angles of the position, see `functional.rotary_embedding`."""
    T, E = cos.shape[0], 2 * cos.shape[1]
    rotated, copied = x.split([heads * E, x.shape[1] - heads * E], dim=1)
    sequences = at_least_fp32(rotated).reshape(-1, T, heads, E)
    if interleaved:
        first, second = sequences.unflatten(3, (-1, 2)).unbind(4)  # [n, T, H, E/2]
    else:
        first, second = sequences.chunk(2, dim=3)  # [n, T, H, E/2]
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, E/2]
    pairs = first * cos - second * sin, second * cos + first * sin
    result = torch.stack(pairs, dim=4) if interleaved else torch.cat(pairs, dim=3)
    return torch.cat([result.reshape(rotated.shape).to(x.dtype), copied], dim=1)


def shared_prefix_attention(
    packed: Tensor,
    heads: int,
    prefix_length: int,
    max_length: int,
    offsets: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of a shared prefix and of class suffixes, see `functional.shared_prefix_attention`."""
    return shared_prefix_attention_and_lse(packed, heads, prefix_length, max_length, offsets, scale)[0]


def shared_prefix_attention_and_lse(
    packed: Tensor,
    heads: int,
    prefix_length: int,
    max_length: int,
    offsets: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`shared_prefix_attention`, and the log-sum-exp of the scores, [R, H]; 0 behind the last suffix."""
    P, T = prefix_length, packed.shape[0] - prefix_length
    prefix, suffixes = packed.unflatten(1, (3, heads, -1)).split([P, T])  # [tokens, 3, H, E]
    if offsets is None:
        padded = suffixes.unflatten(0, (-1, max_length))
    else:
        padded = padded_suffixes(suffixes, offsets, max_length)
    query, key, value = padded.unbind(2)  # [K, S, H, E]
    K, S, H, E = query.shape
    key, value = (
        torch.cat([shared.expand(K, P, H, E), own], dim=1)
        for shared, own in zip(prefix.unbind(1)[1:], (key, value), strict=True)
    )
    visible = torch.ones(S, P + S, dtype=torch.bool, device=packed.device).tril(diagonal=P)
    results = _attention(query, key, value, visible, scale)
    out, lse = (x.flatten(0, 1) if offsets is None else packed_suffixes(x, offsets, T) for x in results)
    if P > 0:
        query, key, value = prefix[None].unbind(2)
        results = _attention(query, key, value, visible.new_ones(P, P).tril(), scale)
        out, lse = (torch.cat([own[0], x]) for own, x in zip(results, (out, lse), strict=True))
    return out.flatten(1), lse


def padded_suffixes(packed: Tensor, offsets: Tensor, max_length: int) -> Tensor:
    """Pad suffixes with zeros: [T, …] → [K, max_length, …]."""
    rows = offsets[:-1, None] + torch.arange(max_length, device=offsets.device)
    padding = (rows >= offsets[1:, None]).view(*rows.shape, *[1] * (packed.dim() - 1))
    return packed[rows.clamp_max(packed.shape[0] - 1)].masked_fill(padding, 0)


def packed_suffixes(padded: Tensor, offsets: Tensor, T: int) -> Tensor:
    """Remove the padding: [K, S, …] → [T, …]; rows behind the last suffix are 0."""
    rows = torch.arange(T, device=offsets.device)
    suffix = torch.searchsorted(offsets[1:].contiguous(), rows, right=True).clamp_max(padded.shape[0] - 1)
    behind = (rows >= offsets[-1]).view(T, *[1] * (padded.dim() - 2))
    position = (rows - offsets[suffix]).clamp_max(padded.shape[1] - 1)
    return padded[suffix, position].masked_fill(behind, 0)


def pooled_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attention of one query per sequence over its keys, see `functional.pooled_attention`."""
    return pooled_attention_and_lse(query, key, value, scale)[0]


def pooled_attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """`pooled_attention`, and the log-sum-exp of the scores, [B, H]."""
    out, lse = _attention(query[:, None], key, value, None, scale)
    return out.squeeze(1), lse.squeeze(1)


@torch.no_grad()
def sgd_momentum_(
    weight: Tensor | Sequence[Tensor],
    grad: Tensor | Sequence[Tensor],
    momentum_buffer: Tensor | Sequence[Tensor],
    lr: Tensor | float,
    momentum: Tensor | float = 0.9,
    weight_decay: Tensor | float = 0.0,
    seed: Tensor | int | None = None,
    offsets: Sequence[int] | None = None,
    casts: Sequence[Tensor | None] | None = None,
) -> None:
    """One step of SGD with momentum, in place, see `functional.sgd_momentum_`.

    Every product and every sum is rounded separately, so that kernels can return the same bits. With a seed, the random
    bits of element i, counted through the list or in each tensor from its offset, are bits 16 · (i mod 4) to
    16 · (i mod 4) + 15 of splitmix64(seed, i div 4).
    """
    lists = ([x] if isinstance(x, Tensor) else x for x in (weight, grad, momentum_buffer))
    first = 0
    for number, (w, g, b) in enumerate(zip(*lists, strict=True)):
        first = first if offsets is None else offsets[number]
        if seed is not None and w.dtype != torch.bfloat16:
            raise TypeError(f"sgd_momentum_: seed is for bfloat16 weights; got {w.dtype}. Leave it out.")
        old = at_least_fp32(w)
        rate, factor, decay = (
            x.reshape(()).to(old.dtype) if isinstance(x, Tensor) else x for x in (lr, momentum, weight_decay)
        )
        buffer = factor * b.to(old.dtype) + (g.to(old.dtype) + decay * old)
        updated = old - rate * buffer
        b.copy_(buffer)
        w.copy_(updated if seed is None else _round_at_random(updated, seed, first))
        if casts and (cast := casts[number]) is not None and cast.numel() > 0:
            cast.copy_(w)
        first += w.numel()


def sampled(rows: Tensor, class_ids: Tensor | None) -> Tensor:
    """Rows of the sampled classes, [K, …]; without ids all rows."""
    return rows if class_ids is None else rows.index_select(0, class_ids)


def unit_norm(x: Tensor) -> Tensor:
    """Unit-norm rows, in at least fp32."""
    return F.normalize(at_least_fp32(x), dim=-1, eps=UNIT_NORM_EPS)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of [B, queries, H, E] over [B, keys, H, E], and the lse of the scores, [B, queries, H]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # Contiguous: otherwise matmul copies k.mT to [E, keys], for which BLAS sums over E sequentially.
    q, k, v = (at_least_fp32(x).transpose(1, 2).contiguous() for x in (query, key, value))  # [B, H, tokens, E]
    with without_autocast(query.device):
        scores = scale * (q @ k.mT)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).to(query.dtype)
    return out, in_accumulation_dtype(scores.detach()).logsumexp(dim=-1).transpose(1, 2)


def _round_at_random(x: Tensor, seed: Tensor | int, first: int) -> Tensor:
    """Round fp32 to bf16 at random: add 16 random bits below the last bit of bf16, then truncate."""
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
    """Convert a uint64 to the int64 with the same bits: PyTorch multiplies int64 modulo 2⁶⁴, like uint64."""
    value = operator.index(value) & ((1 << 64) - 1)  # NumPy integers have at most 64 bits
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift an int64 right and fill with zeros; `>>` copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
