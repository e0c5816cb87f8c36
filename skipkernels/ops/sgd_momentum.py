"""`sgd_momentum_`: one step of SGD with momentum for a list of tensors, in place.

    g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

Every number is read once and written once. The learning rate and the seed of stochastic rounding are tensors on the
device, so that a captured graph reads new values at each replay. Each product is rounded, as in the reference
(`reference.sgd_momentum_`): all kernels return the same bits. CPU kernel: csrc/sgd_momentum.cpp.

A list is one call of the operator. On the CPU it is one parallel region (a model has some 150 parameters, most of them
small); on a GPU it is one launch per tensor, at little cost in a captured graph.
"""

from __future__ import annotations

from torch import Tensor

from .. import reference
from . import registration
from .launching import launch, tl, triton

GROUPS = 256  # groups of four elements per program: 1,024 numbers of each tensor
NUM_WARPS = 4


@triton.jit
def _sgd_momentum_kernel(
    weight_ptr,
    grad_ptr,
    momentum_buffer_ptr,
    lr_ptr,
    seed_ptr,
    numel,
    first,
    momentum,
    weight_decay,
    STOCHASTIC: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """buffer ← momentum · buffer + grad + weight_decay · weight; weight ← weight − lr · buffer.

    One program: GROUPS groups of four elements that share a hash. `first` is the index of the first element of the
    tensor in the list; the first group of the first program may begin before the tensor.
    """
    group = first // 4 + tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, 4)
    offs = group[:, None] * 4 + lane[None, :] - first  # [GROUPS, 4]
    mask = (offs >= 0) & (offs < numel)

    lr = tl.load(lr_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + offs, mask=mask).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    momentum_buffer = tl.load(momentum_buffer_ptr + offs, mask=mask).to(tl.float32)

    momentum_buffer = momentum * momentum_buffer + (grad + weight_decay * weight)
    weight = weight - lr * momentum_buffer
    tl.store(momentum_buffer_ptr + offs, momentum_buffer.to(momentum_buffer_ptr.dtype.element_ty), mask=mask)

    if STOCHASTIC:  # add random bits below the last bit of bf16 and truncate
        x = tl.load(seed_ptr).to(tl.uint64) + (group.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x = x ^ (x >> 31)
        random = ((x[:, None] >> (16 * lane[None, :]).to(tl.uint64)) & 0xFFFF).to(tl.uint32)
        bits = weight.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        weight = tl.where(finite, (bits + random) & 0xFFFF0000, bits).to(tl.float32, bitcast=True)
    tl.store(weight_ptr + offs, weight.to(weight_ptr.dtype.element_ty), mask=mask)


def _launch(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    seed: Tensor | None,
) -> None:
    first = 0
    for weight, grad, momentum_buffer in zip(weights, grads, momentum_buffers, strict=True):
        numel, changed = weight.numel(), [weight.contiguous(), momentum_buffer.contiguous()]
        launch(
            _sgd_momentum_kernel,
            (triton.cdiv(first % 4 + numel, 4 * GROUPS) if numel else 0,),
            device=weight.device,
            num_warps=NUM_WARPS,
            fp_fusion=False,
            weight_ptr=changed[0],
            grad_ptr=grad.contiguous(),
            momentum_buffer_ptr=changed[1],
            lr_ptr=lr,
            seed_ptr=seed,
            numel=numel,
            first=first,
            momentum=momentum,
            weight_decay=weight_decay,
            STOCHASTIC=seed is not None,
            GROUPS=GROUPS,
        )
        for tensor, new in zip((weight, momentum_buffer), changed, strict=True):
            if new is not tensor:
                tensor.copy_(new)
        first += numel


def _fallback(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    momentum: float,
    weight_decay: float,
    seed: Tensor | None,
) -> None:
    reference.sgd_momentum_(weights, grads, momentum_buffers, lr, momentum, weight_decay, seed)


def _fake(weights: list[Tensor], *_: object) -> None:
    pass


sgd_momentum_ = registration.define(
    "sgd_momentum_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, float momentum,"
    " float weight_decay, Tensor? seed) -> ()",
    fallback=_fallback,
    fake=_fake,
    launch=_launch,
)
registration.not_differentiable(sgd_momentum_)
registration.mutates(sgd_momentum_)
