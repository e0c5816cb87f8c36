"""bench.paper_cost: the formula against a count by hooks, and against the published table."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

from bench import paper_cost
from bench.paper_cost import Tower


def test_formula_equals_a_count_of_outputs_and_parameters():
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
    text = {"context_length": 9, "vocab_size": 60, "width": 40, "heads": 2, "layers": 2}
    model = open_clip.CLIP(24, vision, text)
    found = {"outputs": 0, "parameters": 0}

    def count(module, inputs, output):
        found["outputs"] += output.numel()
        found["parameters"] += sum(p.numel() for p in module.parameters())

    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.Linear, nn.Conv2d)):
            module.register_forward_hook(count)
    images, texts = 5, 4
    tokens = torch.zeros(texts, 9, dtype=torch.int64)
    model(torch.randn(images, 3, 32, 32), tokens)
    image = Tower(17, 48, 3, patch=8)  # open_clip normalizes all tokens, OpenAI's model the pooled one
    estimate = paper_cost.summary(images, texts, image, Tower(9, 40, 2))
    assert estimate == images * paper_cost.INPUT + 2 * (2 * found["outputs"] + found["parameters"])


def test_costs_are_the_published_ones():
    found = {(cost.method, cost.protocol): cost for cost in paper_cost.costs()}
    for (method, protocol), cost in found.items():
        expected = pytest.approx(cost.published, abs=1.5 if "Skip" in method else 0.5)
        other = (method, protocol) in [
            ("Skip Tuning, λ = 0.1", "base-to-new"),
            ("Skip Tuning, λ = 0.3", "ImageNet, 1,000 classes"),
        ]
        assert (cost.megabytes == expected) != other
