"""Benchmark of `class_sampled_ce`: a few-shot step (4 images, 50 of 100 classes) to all classes of ImageNet-21k.

The last case is a batch of pairs, for which peers have contrastive losses: the mean of both directions, two calls of
the operator.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference

from .. import peers
from . import COMPILED, CPU, Case, compiled, with_gradients

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
TARGETS = {(4, 50): "≥ 1", (4096, 21841): "≥ 1.2"}
COMPILED_WORK = 4 * 21841 * 512  # on a CPU: above this, torch.compile takes minutes and is not faster than eager
NOT_COMPILED = "not timed here: its matrix products are eager's"
SCALE = 100.0


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    for shape in SHAPES:
        yield of_classes(*shape, dtype, device)
    yield of_pairs(*PAIRS, dtype, device)


def of_classes(B: int, C: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    rng = torch.Generator().manual_seed(0)
    sampled = torch.randperm(C, generator=rng)[:K] if K < C else None
    named = torch.arange(C) if sampled is None else sampled
    named = named[torch.randint(0, K, (B,), generator=rng)]
    bank = torch.randn(C, D, generator=rng)
    image = (0.1 * bank[named] + torch.randn(B, D, generator=rng)).to(dtype).to(device).requires_grad_()
    text = bank.to(dtype).to(device).requires_grad_()
    labels = named.to(device)
    class_ids = None if sampled is None else sampled.to(device)
    scale = torch.tensor(SCALE, device=device, requires_grad=True)
    inputs = [image, text, scale]
    d_loss = [torch.ones((), device=device)]

    def sample() -> tuple[Tensor, Tensor]:
        """The kept rows and the positions of the labels among them, in plain PyTorch."""
        if class_ids is None:
            return text, labels
        return text[class_ids], (labels[:, None] == class_ids).int().argmax(dim=1)

    def ours() -> list[Tensor]:
        return [functional.class_sampled_ce(image, text, labels, scale, class_ids=class_ids)]

    def eager() -> list[Tensor]:
        rows, target = sample()
        logits = F.normalize(image, dim=-1) @ F.normalize(rows, dim=-1).T * scale.to(dtype)
        return [F.cross_entropy(logits, target).float()]

    def of_peer(cross_entropy):
        def loss() -> list[Tensor]:
            rows, target = sample()
            unit = scale.to(dtype) * F.normalize(image, dim=-1)
            return [cross_entropy(unit, F.normalize(rows, dim=-1), target).float()]

        return with_gradients(loss, inputs, d_loss)

    def truth() -> list[Tensor]:
        wide = [x.detach().double().requires_grad_() for x in inputs]
        loss = reference.class_sampled_ce(wide[0], wide[1], labels, wide[2], class_ids)
        return [loss.detach(), *torch.autograd.grad(loss, wide)]

    runs = {"skipkernels": with_gradients(ours, inputs, d_loss), "eager": with_gradients(eager, inputs, d_loss)}
    absent = {}
    if worth_compiling(B * K * D, device):
        loss = compiled(reference.class_sampled_ce)
        runs[COMPILED] = with_gradients(lambda: [loss(image, text, labels, scale, class_ids)], inputs, d_loss)
    else:
        absent[COMPILED] = NOT_COMPILED
    return Case(
        shape=f"B{B}-C{C}-K{K}-D{D}",
        runs=runs,
        truth=truth,
        # Forward and backward read the rows and backward writes their gradients, that of the text for the whole bank;
        # also labels, class ids and row statistics.
        moved=dtype.itemsize * (3 * B + 2 * K + C) * D + 16 * (B + K) + 24 * B + 8 * K,
        flops=3 * 2 * B * K * D,
        absent=absent,
        target=TARGETS.get((B, K), ""),
    ).with_peers(peers.cross_entropies(device, dtype, B), of_peer)


def of_pairs(B: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Cases of pairs: image b belongs to text b. The scale is a number, since not every peer has a gradient for it."""
    rng = torch.Generator().manual_seed(0)
    bank = torch.randn(B, D, generator=rng)
    # Cosines of pairs are about 0.3, as CLIP's are.
    image = (0.3 * bank + torch.randn(B, D, generator=rng)).to(dtype).to(device).requires_grad_()
    text = bank.to(dtype).to(device).requires_grad_()
    labels = torch.arange(B, device=device)
    inputs = [image, text]

    def run(loss, inputs=inputs):
        d_loss = [torch.ones((), device=device, dtype=torch.float64 if inputs[0].dtype == torch.float64 else None)]
        return with_gradients(lambda: [loss(*inputs)], inputs, d_loss)

    def both_directions(cross_entropy):
        def loss(image: Tensor, text: Tensor) -> Tensor:
            return (cross_entropy(image, text, labels, SCALE) + cross_entropy(text, image, labels, SCALE)) / 2

        return loss

    def eager(image: Tensor, text: Tensor) -> Tensor:
        logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * SCALE
        return ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2).float()

    runs = {"skipkernels": run(both_directions(functional.class_sampled_ce)), "eager": run(eager)}
    absent = {}
    if worth_compiling(B * B * D, device):
        runs[COMPILED] = run(compiled(both_directions(reference.class_sampled_ce)))
    else:
        absent[COMPILED] = NOT_COMPILED
    return Case(
        shape=f"B{B}-D{D}-pairs",
        runs=runs,
        truth=run(both_directions(reference.class_sampled_ce), [x.detach().double().requires_grad_() for x in inputs]),
        # Forward and backward read both and backward writes their gradients; both directions have the same logits.
        moved=dtype.itemsize * 6 * B * D,
        flops=3 * 2 * B * B * D,
        absent=absent,
    ).with_peers(
        peers.contrastive_losses(device, dtype, B),
        lambda loss: run(lambda image, text: loss(image, text, SCALE).float()),
    )


def worth_compiling(work: int, device: torch.device) -> bool:
    return device.type != "cpu" or work <= COMPILED_WORK
