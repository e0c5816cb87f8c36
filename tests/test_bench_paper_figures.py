"""Figures of the paper: gradient dependence against autograd, and feature sensitivity of a known change."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from bench import paper_figures
from skipkernels.app.demo import pictogram_tiny

B, C, D, SCALE = 6, 9, 5, 12.0


def test_gradient_dependence_matches_autograd():
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (B, C))
    text *= torch.logspace(-1, 1, C, dtype=torch.float64)[:, None]
    labels = torch.randint(C, (B,), generator=generator)
    expected = torch.zeros(C, dtype=torch.float64)
    for one, label in zip(image, labels.tolist(), strict=True):
        leaf = text.clone().requires_grad_()
        cosine = F.normalize(leaf, dim=1) @ F.normalize(one, dim=0)
        F.cross_entropy(SCALE * cosine[None], torch.tensor([label])).backward()
        norms = leaf.grad.norm(dim=1)
        others = sorted(set(range(C)) - {label}, key=cosine.tolist().__getitem__, reverse=True)
        expected += norms[[label, *others]] / norms.sum() / B
    share = paper_figures.gradient_dependence(image, text, labels, SCALE)
    torch.testing.assert_close(share, expected, rtol=1e-10, atol=0)


def test_feature_sensitivity_of_a_changed_block():
    """A change of the last but one block shows in it and in the last block, and in no other."""
    before, _, tokenizer = pictogram_tiny.load()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.visual.trunk.blocks[2].mlp.fc2.bias.add_(0.1)
    images, tokens = torch.rand(4, 3, 32, 32).split(2), tokenizer(["one.", "two."])
    image, text = paper_figures.feature_sensitivity(before, after, images, tokens)
    assert [value > 0 for value in image] == [False] * 2 + [True] * 2 and text == [0.0] * 4
    assert image[2] < 1  # relative to the output
