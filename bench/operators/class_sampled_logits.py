"""Benchmark of `class_sampled_logits`: a few-shot step (4 images, 50 of 100 classes) to all classes of ImageNet-21k."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.ops.class_sampled_logits import class_sampled_logits

from ..measure import CPU, OURS
from . import Arguments, Case, Random, Work, case
from .class_sampled_ce import LAUNCHED, SHAPES, Launched, calls
from .record import Call, Record


def eager(image: Tensor, text: Tensor, logit_scale: Tensor, class_ids: Tensor | None = None) -> Tensor:
    rows = text if class_ids is None else text[class_ids]
    cosines = F.normalize(image, dim=-1) @ F.normalize(rows, dim=-1).T
    return (cosines * logit_scale.to(image.dtype)).to(logit_scale.dtype)


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    for B, C, K, D in SHAPES[:-1]:  # the last has 358 MB of logits
        random = Random(dtype, device)
        yield case(
            f"B{B}-C{C}-K{K}-D{D}",
            {OURS: functional.class_sampled_logits, "eager": eager},
            reference.class_sampled_logits,
            Arguments(
                options={"class_ids": random.sample(C, K)},
                inputs=[random(B, D), random(C, D), torch.tensor(100.0, device=device)],
                d_outputs=[random(B, K, dtype=torch.float32)],
            ),
            # Forward and backward read the rows and backward writes their gradients, that of the text for the whole
            # bank; also class ids, row norms, and the logits and their gradient.
            Work(dtype.itemsize * (3 * B + 2 * K + C) * D + 16 * K + 8 * B * K, flops=6 * B * K * D),
        )


def launches(dtype: torch.dtype, shapes: Sequence[Launched] = LAUNCHED) -> Iterator[Call]:
    """Calls at evaluation sizes first."""
    for shape, call in reversed(list(calls(dtype, shapes))):
        yield Call(shape, (call.image, call.text, call.logit_scale, call.class_ids))


def launches_backward(dtype: torch.dtype, shapes: Sequence[Launched] = LAUNCHED) -> Iterator[Call]:
    for shape, (*tensors, class_ids) in launches(dtype, shapes):
        d_logits, *norms = class_sampled_logits(*tensors, class_ids)
        yield Call(shape, (d_logits, *tensors, *norms, class_ids, True, True, False))


NARROW = (Launched(4, 100, 50, 256),)
RECORD = Record(
    cases=cases,
    launches={"class_sampled_logits": launches, "class_sampled_logits_backward": launches_backward},
    widths={"class_sampled_logits_backward": functools.partial(launches_backward, shapes=NARROW)},
    small_calls={
        "class_sampled_logits": lambda randn: (
            {"image": randn(2, 4), "text": randn(5, 4), "logit_scale": torch.tensor(5.0)},
            {"class_ids": torch.tensor([0, 2, 3])},
        ),
        "pairwise_sigmoid": lambda randn: (
            {
                "image": randn(2, 4),
                "text": randn(5, 4),
                "logit_scale": torch.tensor(5.0),
                "logit_bias": torch.tensor(-5.0),
            },
            {"labels": torch.tensor([-1, 3])},
        ),
        "pairwise_sigmoid_loss": lambda randn: (
            {
                "image": randn(3, 4),
                "text": randn(3, 4),
                "logit_scale": torch.tensor(5.0),
                "logit_bias": torch.tensor(-5.0),
            },
            {},
        ),
    },
    flops={
        "class_sampled_logits": lambda image, *_, out_shape, **__: 2 * image.numel() * out_shape[0][1],
        "class_sampled_logits_backward": lambda d_logits, image, *_, **__: 4 * image.numel() * d_logits[1],
    },
)
