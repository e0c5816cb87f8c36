"""Benchmark of `class_sampled_ce`: a few-shot step (4 images, 50 of 100 classes) to all classes of ImageNet-21k.

The last case is the contrastive loss of a batch of pairs: the mean of both directions, two calls of the operator, or of
a peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.ops.class_sampled_ce import REDUCTIONS, Backward, Forward, class_sampled_ce

from .. import peers
from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .record import Call, Record, ids, on_meta

# B, C, K, D. At K = C there are no class_ids.
SHAPES = (
    (4, 100, 50, 512),
    (4, 1000, 107, 512),
    (32, 1000, 1000, 512),
    (256, 1000, 1000, 512),
    (4, 21841, 21841, 512),
    (4096, 21841, 21841, 512),
)
PAIRS = (1024, 512)  # B, D
COMPILED_WORK = 4 * 21841 * 512  # on a CPU: above this, torch.compile takes minutes and is not faster than eager
SCALE = 100.0

Loss = Callable[..., Tensor]


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    for shape in SHAPES:
        yield of_classes(*shape, dtype, device)
    yield of_pairs(*PAIRS, dtype, device)


def of_classes(B: int, C: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The case of K of C classes."""
    random = Random(dtype, device)
    class_ids = random.sample(C, K)
    labels = random.integers(K, B)
    labels = labels if class_ids is None else class_ids[labels]
    bank = random(C, D, dtype=torch.float32)
    image = 0.1 * bank[labels] + random(B, D, dtype=torch.float32)
    return case(
        f"B{B}-C{C}-K{K}-D{D}",
        {OURS: functional.class_sampled_ce, "eager": eager},
        reference.class_sampled_ce,
        Arguments(
            [image.to(dtype), bank.to(dtype), labels, torch.tensor(SCALE, device=device)],
            [torch.ones((), device=device)],
            {"class_ids": class_ids},
        ),
        # Forward and backward read the rows and backward writes their gradients, that of the text for the whole bank;
        # also labels, class ids and row statistics.
        Work(
            dtype.itemsize * (3 * B + 2 * K + C) * D + 16 * (B + K) + 24 * B + 8 * K,
            flops=3 * 2 * B * K * D,
        ),
        peers.adapted(peers.cross_entropies(device, dtype), peer),
        not_compiled(B * K * D, device),
    )


def of_pairs(B: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    """The case of pairs: image b belongs to text b. The scale has no gradient, since not every peer has one for it."""
    random = Random(dtype, device)
    bank = random(B, D, dtype=torch.float32)
    # Cosines of pairs are about 0.3, as CLIP's are.
    image = 0.3 * bank + random(B, D, dtype=torch.float32)
    labels = torch.arange(B, device=device)
    both = partial(both_directions, labels=labels, scale=torch.tensor(SCALE, device=device))
    return case(
        f"B{B}-D{D}-pairs",
        {OURS: both(functional.class_sampled_ce), "eager": partial(eager_pairs, labels=labels)},
        both(reference.class_sampled_ce),
        Arguments([image.to(dtype), bank.to(dtype)], [torch.ones((), device=device)]),
        # Forward and backward read both and backward writes their gradients; both directions have the same logits.
        Work(dtype.itemsize * 6 * B * D, flops=3 * 2 * B * B * D),
        peers.adapted(peers.cross_entropies(device, dtype), lambda of: both(peer(of))),
        not_compiled(B * B * D, device),
    )


def not_compiled(work: int, device: torch.device) -> str:
    is_slow = device.type == "cpu" and work > COMPILED_WORK
    return "not timed here: its matrix products are eager's" if is_slow else ""


# ---- implementations -------------------------------------------------------------------------------------------------


def kept(image: Tensor, text: Tensor, labels: Tensor, class_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-norm images, unit-norm rows of the kept classes, and the positions of the labels among them."""
    if class_ids is not None:
        text, labels = text[class_ids], (labels[:, None] == class_ids).int().argmax(dim=1)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1), labels


def eager(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, class_ids: Tensor | None = None) -> Tensor:
    image, text, targets = kept(image, text, labels, class_ids)
    return F.cross_entropy(image @ text.T * scale.to(image.dtype), targets).float()


def peer(cross_entropy: Loss) -> Loss:
    """The operator by a peer's cross-entropy of `image @ text.T`."""

    def loss(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, class_ids: Tensor | None = None) -> Tensor:
        image, text, targets = kept(image, text, labels, class_ids)
        return cross_entropy(scale.to(image.dtype) * image, text, targets).float()

    return loss


def both_directions(cross_entropy: Loss, labels: Tensor, scale: Tensor) -> Loss:
    """The contrastive loss of pairs by two calls."""

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return (cross_entropy(image, text, labels, scale) + cross_entropy(text, image, labels, scale)) / 2

    return loss


def eager_pairs(image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * SCALE
    return ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).float()


# ---- record ----------------------------------------------------------------------------------------------------------


class Launched(NamedTuple):
    """Sizes of a call to compile and count; `weighted` with class weights and label smoothing."""

    B: int
    C: int
    K: int
    D: int
    weighted: bool = False
    reduction: str = "mean"


LAUNCHED = (
    Launched(4, 100, 50, 512),
    Launched(4096, 21841, 21841, 512),
    Launched(33, 101, 51, 640, weighted=True, reduction="none"),
)


def calls(dtype: torch.dtype, shapes: Sequence[Launched] = LAUNCHED) -> Iterator[tuple[str, Forward]]:
    """Shapes in the form of test ids, and arguments of the operator."""
    for B, C, K, D, weighted, reduction in shapes:
        yield (
            f"B{B}-C{C}-K{K}-D{D}",
            Forward(
                image=on_meta(B, D, dtype=dtype),
                text=on_meta(C, D, dtype=dtype),
                labels=ids(B),
                logit_scale=on_meta(dtype=torch.float32),
                class_ids=ids(K) if K < C else None,
                class_weight=on_meta(C, dtype=torch.float32) if weighted else None,
                label_smoothing=0.1 if weighted else 0.0,
                ignore_index=-100,
                reduction=REDUCTIONS.index(reduction),
            ),
        )


def launches(dtype: torch.dtype) -> Iterator[Call]:
    for shape, call in calls(dtype):
        yield Call(shape, call)


def launches_backward(dtype: torch.dtype) -> Iterator[Call]:
    for shape, call in calls(dtype):
        d_loss, *saved = class_sampled_ce(*call)
        tensors = call.image, call.text, call.labels, call.logit_scale
        options = call.class_ids, call.class_weight, call.label_smoothing, call.ignore_index, call.reduction
        yield Call(shape, Backward(d_loss, *tensors, *saved, *options, True, True, True))


def flops(*shapes: Any, out_shape: Any) -> int:
    loss, lse, image_norm, text_norm, *kept = out_shape
    return 2 * Forward(*shapes).image.numel() * text_norm.numel()


def flops_backward(*shapes: Any, out_shape: Any) -> int:
    call = Backward(*shapes)
    return 4 * call.image.numel() * call.text_norm.numel()


RECORD = Record(
    cases=cases,
    launches={"class_sampled_ce": launches, "class_sampled_ce_backward": launches_backward},
    small_calls={
        "class_sampled_ce": lambda randn: (
            {"image": randn(2, 4), "text": randn(5, 4), "logit_scale": torch.tensor(5.0)},
            {
                "labels": torch.tensor([0, 3]),
                "class_ids": torch.tensor([0, 2, 3]),
                "class_weight": torch.ones(5),
                "label_smoothing": 0.1,
            },
        ),
        "contrastive_loss": lambda randn: (
            {"image": randn(3, 4), "text": randn(3, 4), "logit_scale": torch.tensor(5.0)},
            {},
        ),
    },
    flops={"class_sampled_ce": flops, "class_sampled_ce_backward": flops_backward},
)
