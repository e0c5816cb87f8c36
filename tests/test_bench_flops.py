"""bench.flops against explicit formulas and plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import skipkernels as sk
from bench.flops import flops_of

B, C, K, D = 4, 10, 3, 8
IMAGE, TEXT = (torch.randn(n, D, requires_grad=True) for n in (B, C))
IDS, LABELS = torch.tensor([1, 2, 5]), torch.tensor([1, 2, 1, 1])


def test_flops_of_ignores_dropped_classes():
    def loss(class_ids):
        return sk.functional.class_sampled_ce(IMAGE, TEXT, LABELS, 100.0, class_ids=class_ids)

    def logits(class_ids):
        return sk.functional.class_sampled_logits(IMAGE, TEXT, 100.0, class_ids=class_ids).sum()

    for of in (loss, logits):
        assert flops_of(lambda of=of: of(IDS)) == 2 * B * K * D
        assert flops_of(lambda of=of: of(IDS).backward()) == 6 * B * K * D
        assert flops_of(lambda of=of: of(None).backward()) == 6 * B * C * D
    assert flops_of(lambda: sk.functional.class_scores(IMAGE, TEXT, LABELS)) == 2 * B * C * D


def test_flops_of_scaled_dot_product_attention():
    query, key = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7))
    once = 2 * 2 * 3 * 5 * 7 * 8
    assert flops_of(lambda: F.scaled_dot_product_attention(query, key, key)) == 2 * once
    assert flops_of(lambda: F.scaled_dot_product_attention(query, key, key).sum().backward()) == 7 * once


@pytest.mark.parametrize("packed", [False, True])
def test_flops_of_shared_prefix_attention(packed):
    K, S, P, H, E = 6, 3, 4, 2, 8
    tokens = torch.randn(P + K * S, 3 * H * E, requires_grad=True)
    how = {"heads": H, "prefix_length": P, "max_length": S, "offsets": torch.arange(K + 1) * S if packed else None}
    once = 2 * H * E * (K * (S * P + 1 + 2 + 3) + 1 + 2 + 3 + 4)

    def attend():
        return sk.functional.shared_prefix_attention(tokens, **how)

    assert flops_of(attend) == 2 * once
    assert flops_of(lambda: attend().sum().backward()) == 7 * once
