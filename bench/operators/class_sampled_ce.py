"""Benchmark of `class_sampled_ce`: a few-shot step (4 images, 50 of 100 classes) to all classes of ImageNet-21k.

The last case is the contrastive loss of a batch of pairs: the mean of both directions, two calls of the operator, or of
a peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.ops.class_sampled_ce import REDUCTIONS, Forward, class_sampled_ce

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


def over_sample(cross_entropy: Loss) -> Loss:
    """A cross-entropy over the kept rows and the positions of the labels among them, in plain PyTorch."""

    def loss(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor, class_ids: Tensor | None) -> Tensor:
        if class_ids is not None:
            text, labels = text[class_ids], (labels[:, None] == class_ids).int().argmax(dim=1)
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return cross_entropy(image, text, labels, scale.to(image.dtype)).float()

    return loss


@over_sample
def eager(image: Tensor, text: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(image @ text.T * scale, labels)


def of_peer(cross_entropy: Loss) -> Loss:
    return over_sample(lambda image, text, labels, scale: cross_entropy(scale * image, text, labels))


def of_classes(B: int, C: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
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
        peers.adapted(peers.cross_entropies(device, dtype), of_peer),
        not_compiled(B * K * D, device),
    )


def of_pairs(B: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Cases of pairs: image b belongs to text b. The scale has no gradient, since not every peer has one for it."""
    random = Random(dtype, device)
    bank = random(B, D, dtype=torch.float32)
    # Cosines of pairs are about 0.3, as CLIP's are.
    image = 0.3 * bank + random(B, D, dtype=torch.float32)
    labels, scale = torch.arange(B, device=device), torch.tensor(SCALE, device=device)

    def both_directions(cross_entropy: Loss) -> Loss:
        def loss(image: Tensor, text: Tensor) -> Tensor:
            return (cross_entropy(image, text, labels, scale) + cross_entropy(text, image, labels, scale)) / 2

        return loss

    def eager(image: Tensor, text: Tensor) -> Tensor:
        logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * SCALE
        return ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).float()

    return case(
        f"B{B}-D{D}-pairs",
        {OURS: both_directions(functional.class_sampled_ce), "eager": eager},
        both_directions(reference.class_sampled_ce),
        Arguments([image.to(dtype), bank.to(dtype)], [torch.ones((), device=device)]),
        # Forward and backward read both and backward writes their gradients; both directions have the same logits.
        Work(dtype.itemsize * 6 * B * D, flops=3 * 2 * B * B * D),
        peers.adapted(
            peers.cross_entropies(device, dtype), lambda peer: both_directions(partial(of_peer(peer), class_ids=None))
        ),
        not_compiled(B * B * D, device),
    )


def not_compiled(work: int, device: torch.device) -> str:
    is_slow = device.type == "cpu" and work > COMPILED_WORK
    return "not timed here: its matrix products are eager's" if is_slow else ""


# ---- record ----------------------------------------------------------------------------------------------------------

# B, C, K, D, class weights and smoothing, reduction.
LAUNCHED = (
    (4, 100, 50, 512, False, "mean"),
    (4096, 21841, 21841, 512, False, "mean"),
    (33, 101, 51, 640, True, "none"),
)


def calls(dtype: torch.dtype, shapes: Sequence[tuple[Any, ...]] = LAUNCHED) -> Iterator[tuple[str, Forward]]:
    """Shapes in the form of test ids, and arguments of the operator."""
    for B, C, K, D, all_options, reduction in shapes:
        yield (
            f"B{B}-C{C}-K{K}-D{D}",
            Forward(
                image=on_meta(B, D, dtype=dtype),
                text=on_meta(C, D, dtype=dtype),
                labels=ids(B),
                logit_scale=on_meta(dtype=torch.float32),
                class_ids=ids(K) if K < C else None,
                class_weight=on_meta(C, dtype=torch.float32) if all_options else None,
                label_smoothing=0.1 if all_options else 0.0,
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
        tensors, options = call[:4], call[4:9]
        yield Call(shape, (d_loss, *tensors, *saved, *options, True, True, True))


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
    flops={
        "class_sampled_ce": lambda image, *_, out_shape, **__: 2 * image.numel() * out_shape[3][0],
        "class_sampled_ce_backward": lambda _, image, *rest, **__: 4 * image.numel() * rest[5][0],
    },
)
