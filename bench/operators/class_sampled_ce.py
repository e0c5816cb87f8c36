"""`class_sampled_ce` from a few-shot step (4 images, 50 classes of 100) to a large batch over all of ImageNet-21k."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from . import Case, with_gradients

# B, C, K, D. At K = C there are no class_ids.
SHAPES = (
    (4, 100, 50, 512),
    (4, 1000, 107, 512),
    (32, 1000, 1000, 512),
    (256, 1000, 1000, 512),
    (4, 21841, 21841, 512),
    (4096, 21841, 21841, 512),
)
TARGETS = {(4, 50): "≥ 1", (4096, 21841): "≥ 1.2"}
COMPILED_WORK = 4 * 21841 * 512  # beyond that torch.compile of the reference is eager's time again, and minutes of it
SCALE = 100.0


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for shape in SHAPES:
        yield case(*shape, dtype)


def case(B: int, C: int, K: int, D: int, dtype: torch.dtype) -> Case:
    rng = torch.Generator().manual_seed(0)
    class_ids = torch.randperm(C, generator=rng)[:K] if K < C else None
    labels = torch.arange(C) if class_ids is None else class_ids
    labels = labels[torch.randint(0, K, (B,), generator=rng)]
    text = torch.randn(C, D, generator=rng)
    image = (0.1 * text[labels] + torch.randn(B, D, generator=rng)).to(dtype).requires_grad_()
    text = text.to(dtype).requires_grad_()
    scale = torch.tensor(SCALE, requires_grad=True)
    inputs = [image, text, scale]

    def sample(text: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that take part and the labels' places among them, as a user writes it."""
        if class_ids is None:
            return text, labels
        return text[class_ids], (labels[:, None] == class_ids).int().argmax(dim=1)

    def ours() -> list[Tensor]:
        return [functional.class_sampled_cross_entropy(image, text, labels, scale, class_ids=class_ids)]

    def eager() -> list[Tensor]:
        rows, target = sample(text)
        logits = F.normalize(image, dim=-1) @ F.normalize(rows, dim=-1).T * scale.to(dtype)
        return [F.cross_entropy(logits, target).float()]

    def chunked() -> list[Tensor]:
        rows, target = sample(text)
        unit = scale.to(dtype) * F.normalize(image, dim=-1)
        options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=False)
        return [F.linear_cross_entropy(unit, F.normalize(rows, dim=-1), target, options=options).float()]

    def truth() -> list[Tensor]:
        wide = [x.detach().double().requires_grad_() for x in inputs]
        loss = reference.class_sampled_ce(wide[0], wide[1], labels, wide[2], class_ids)
        return [loss.detach(), *torch.autograd.grad(loss, wide)]

    d_loss = [torch.ones(())]
    runs = {"skipkernels": with_gradients(ours, inputs, d_loss), "eager": with_gradients(eager, inputs, d_loss)}
    absent = {}
    if hasattr(F, "linear_cross_entropy"):
        runs["linear_cross_entropy"] = with_gradients(chunked, inputs, d_loss)
    else:
        absent["linear_cross_entropy"] = "F.linear_cross_entropy needs torch 2.13"
    if B * K * D <= COMPILED_WORK:
        compiled = torch.compile(reference.class_sampled_ce, dynamic=True)
        runs["compiled reference"] = with_gradients(
            lambda: [compiled(image, text, labels, scale, class_ids)], inputs, d_loss
        )
    else:
        absent["compiled reference"] = "not timed here: its matrix products are eager's"
    return Case(
        shape=f"B{B}-C{C}-K{K}-D{D}",
        runs=runs,
        truth=truth,
        # Forward and backward read the rows and backward writes their gradients, that of the text for the whole bank;
        # labels, class ids and statistics of the rows besides.
        moved=dtype.itemsize * (3 * B + 2 * K + C) * D + 16 * (B + K) + 24 * B + 8 * K,
        flops=3 * 2 * B * K * D,
        absent=absent,
        target=TARGETS.get((B, K), ""),
    )
