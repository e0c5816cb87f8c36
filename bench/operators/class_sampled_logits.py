"""Benchmark of `class_sampled_logits`: a few-shot step (4 images, 50 of 100 classes) to all classes of ImageNet-21k."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from skipkernels import functional, reference

from . import COMPILED, CPU, Case, compiled, random, with_gradients

# B, C, K, D. At K = C there are no class_ids.
SHAPES = ((4, 100, 50, 512), (4, 1000, 107, 512), (32, 1000, 1000, 512), (256, 1000, 1000, 512), (4, 21841, 21841, 512))


def cases(dtype: torch.dtype, device: torch.device = CPU) -> Iterator[Case]:
    for shape in SHAPES:
        yield case(*shape, dtype, device)


def case(B: int, C: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> Case:
    rng = torch.Generator().manual_seed(0)
    class_ids = torch.randperm(C, generator=rng)[:K].to(device) if K < C else None
    image, text = (random(rng, n, D, dtype=dtype, device=device).requires_grad_() for n in (B, C))
    scale = torch.tensor(100.0, device=device, requires_grad=True)
    inputs = [image, text, scale]
    d_logits = [random(rng, B, K, dtype=torch.float32, device=device)]

    def eager() -> list[torch.Tensor]:
        rows = text if class_ids is None else text[class_ids]
        return [(F.normalize(image, dim=-1) @ F.normalize(rows, dim=-1).T * scale.to(dtype)).float()]

    def truth() -> list[torch.Tensor]:
        wide = [x.detach().double().requires_grad_() for x in inputs]
        logits = reference.class_sampled_logits(wide[0], wide[1], wide[2], class_ids)
        return [logits.detach(), *torch.autograd.grad(logits, wide, [d_logits[0].double()])]

    logits = compiled(reference.class_sampled_logits)
    return Case(
        shape=f"B{B}-C{C}-K{K}-D{D}",
        runs={
            "skipkernels": with_gradients(
                lambda: [functional.class_sampled_logits(image, text, scale, class_ids=class_ids)], inputs, d_logits
            ),
            "eager": with_gradients(eager, inputs, d_logits),
            COMPILED: with_gradients(lambda: [logits(image, text, scale, class_ids)], inputs, d_logits),
        },
        truth=truth,
        # Forward and backward read the rows and backward writes their gradients, that of the text for the whole bank;
        # also class ids, row norms, and the logits and their gradient.
        moved=dtype.itemsize * (3 * B + 2 * K + C) * D + 16 * K + 8 * B * K,
        flops=6 * B * K * D,
    )
