"""Gradient dependence: the closed form against autograd, shares by rank, and kept classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels.data import InputError
from skipkernels.experiments.sensitivity import GradientDependence, gradient_norms, measure_gradient_dependence
from skipkernels.selection import RankSampler

B, C, D, SCALE = 6, 9, 5, 12.0


def embeddings(*, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Image embeddings [B, D], text embeddings [C, D] with norms over two decades, and labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (B, C))
    lengths = torch.logspace(-1, 1, C, dtype=torch.float64)
    return image, lengths[:, None] * text, torch.randint(C, (B,), generator=generator)


def by_autograd(image: Tensor, text: Tensor, labels: Tensor, scale: float = SCALE) -> Tensor:
    """Gradient norms of each image's loss with respect to each text embedding, [B, C]."""
    rows = []
    for one, label in zip(image, labels, strict=True):
        leaf = text.clone().requires_grad_()
        logits = scale * F.normalize(leaf, dim=1) @ F.normalize(one, dim=0)
        F.cross_entropy(logits[None], label[None]).backward()
        assert leaf.grad is not None
        rows.append(leaf.grad.norm(dim=1))
    return torch.stack(rows)


def closed_form(image: Tensor, text: Tensor, labels: Tensor, scale: float = SCALE) -> Tensor:
    cosine = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    return gradient_norms(cosine, text.norm(dim=1), labels, scale)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_norms_match_autograd(seed):
    image, text, labels = embeddings(seed=seed)
    torch.testing.assert_close(closed_form(image, text, labels), by_autograd(image, text, labels), rtol=1e-10, atol=0)


def test_gradient_norms_from_unit_norm_gradient():
    """‖∂loss/∂t̂_c‖ = s·|p_c − y_c|, before the root and the length."""
    image, text, labels = embeddings()
    unit_image, unit_text = F.normalize(image, dim=1), F.normalize(text, dim=1).requires_grad_()
    logits = SCALE * unit_image @ unit_text.T
    F.cross_entropy(logits, labels, reduction="sum").backward()
    residual = logits.detach().softmax(dim=1) - F.one_hot(labels, C)
    assert unit_text.grad is not None
    torch.testing.assert_close(unit_text.grad, SCALE * residual.T @ unit_image, rtol=1e-10, atol=1e-14)
    cosine = unit_image @ unit_text.detach().T
    expected = SCALE * residual.abs() * (1 - cosine**2).sqrt() / text.norm(dim=1)
    torch.testing.assert_close(closed_form(image, text, labels), expected, rtol=1e-10, atol=0)


def test_measure_gradient_dependence_matches_reference():
    """The reference sorts the classes of each image with the true one first, and averages the shares."""
    image, text, labels = embeddings()
    norms, expected = by_autograd(image, text, labels), torch.zeros(C, dtype=torch.float64)
    cosine = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    for b in range(B):
        label = int(labels[b])
        others = sorted(set(range(C)) - {label}, key=lambda c: -cosine[b, c])  # noqa: B023 - sorted at once
        expected += norms[b, [label, *others]] / norms[b].sum() / B
    dependence = measure_gradient_dependence(image, text, labels, SCALE)
    torch.testing.assert_close(dependence.share, expected, rtol=1e-10, atol=0)
    assert dependence.images == B
    assert dependence.share.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(dependence.cumulative, torch.cumsum(expected, 0), rtol=1e-10, atol=0)


def test_measure_gradient_dependence_any_chunk_size(monkeypatch):
    image, text, labels = embeddings()
    expected = measure_gradient_dependence(image, text, labels, SCALE).share
    monkeypatch.setattr("skipkernels.experiments.sensitivity.gradient_dependence._CHUNK", 4)
    torch.testing.assert_close(
        measure_gradient_dependence(image, text, labels, SCALE).share, expected, rtol=1e-12, atol=0
    )


def test_measure_gradient_dependence_nearly_certain_image():
    """1 − p_y is 1e-40 here; a subtraction would give 0."""
    text = torch.eye(3, 4, dtype=torch.float64)
    image = torch.tensor([[1.0, 0.1, 0.0, 1.0]], dtype=torch.float64)
    dependence = measure_gradient_dependence(image, text, torch.tensor([0]), 150.0)
    cosine = F.normalize(image, dim=1)[0, :3]
    others = (150 * (cosine - cosine[0])).exp()[1:]
    norms = torch.cat([others.sum()[None], others]) * (1 - cosine**2).sqrt()
    assert others.sum() < 1e-35
    torch.testing.assert_close(dependence.share, norms / norms.sum(), rtol=1e-9, atol=0)


def test_measure_gradient_dependence_skips_images_without_gradient():
    text = torch.eye(3, dtype=torch.float64)
    image = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.4, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    dependence = measure_gradient_dependence(image, text, labels, 2000.0)  # exp(−2000) is 0
    assert dependence.images == 1
    torch.testing.assert_close(dependence.share, measure_gradient_dependence(image[1:], text, labels[1:], 2000.0).share)
    with pytest.raises(InputError, match="no image has a gradient"):
        measure_gradient_dependence(image[:1], text, labels[:1], 2000.0)


@pytest.mark.parametrize("max_tail", [None, 1])
def test_kept_matches_mean_of_published_policy(max_tail):
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(40, generator=generator, dtype=torch.float64).sort(descending=True).values
    dependence = GradientDependence(share / share.sum(), images=1)
    setting = {"keep_ratio": 0.2, "max_keep": 50, "decay": 1.0, "max_tail": max_tail}
    shares = torch.stack(
        [
            dependence.share[RankSampler(**setting, tail="fixed", generator=generator).draw(40, 4)].sum()
            for _ in range(2000)
        ]
    )
    kept = dependence.kept(**setting, batch_size=4)
    assert kept.always == 8 and kept.expected == RankSampler(**setting).expected_keep(40, 4)
    assert abs(kept.share - shares.mean().item()) < 4 * shares.std().item() / 2000**0.5
    assert shares.std() > 0.01, "the tail is drawn"


def test_kept_holds_every_class_of_the_batch():
    dependence = GradientDependence(torch.full((10,), 0.1, dtype=torch.float64), images=1)
    assert dependence.kept(keep_ratio=0.1, max_keep=50, decay=0.3, batch_size=7).always == 7
    every = dependence.kept(keep_ratio=1.0, max_keep=2, decay=0.3)
    assert every.always == every.expected == 10 and every.share == pytest.approx(1)


def test_ranks_for():
    dependence = GradientDependence(torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64), images=1)
    assert [dependence.ranks_for(share) for share in (0.0, 0.5, 0.51, 0.75, 0.876, 1.0)] == [1, 1, 2, 2, 4, 4]
    tenths = GradientDependence(torch.full((10,), 0.1, dtype=torch.float64), images=1)
    assert [tenths.ranks_for(n / 10) for n in range(1, 11)] == list(range(1, 11)), "sums of tenths round"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.ones(B, D + 1)}, r"image must be \[B, D\] and text \[C, D\]"),
        ({"image": torch.ones(D)}, r"image must be \[B, D\]"),
        ({"text": torch.ones(1, D)}, "at least two classes; got 1"),
        ({"labels": torch.zeros(B)}, r"labels must be int64 \[B=6\]"),
        ({"labels": torch.zeros(B - 1, dtype=torch.int64)}, r"labels must be int64 \[B=6\]"),
        ({"labels": torch.full((B,), C)}, r"labels must be in \[0, C=9\); got 9 to 9"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_measure_gradient_dependence_bad_input(changes, message):
    image, text, labels = embeddings()
    with pytest.raises(InputError, match=message):
        measure_gradient_dependence(
            **({"image": image, "text": text, "labels": labels, "logit_scale": SCALE} | changes)
        )
