"""GD: the closed form against autograd, ranks, shares, and what CSkip would keep."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels.data import InputError
from skipkernels.experiments.sensitivity import GradientSpread, gradient_norms, gradient_spread
from skipkernels.selection import RankSampler

B, C, D, SCALE = 6, 9, 5, 12.0


def embeddings(*, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, D], texts [C, D] of very different lengths, and labels [B]."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (B, C))
    lengths = torch.logspace(-1, 1, C, dtype=torch.float64)
    return image, lengths[:, None] * text, torch.randint(C, (B,), generator=generator)


def by_autograd(image: Tensor, text: Tensor, labels: Tensor, scale: float = SCALE) -> Tensor:
    """Norm of the gradient of each image's loss at each text embedding, [B, C]."""
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
def test_the_closed_form_is_that_of_autograd(seed):
    image, text, labels = embeddings(seed=seed)
    torch.testing.assert_close(closed_form(image, text, labels), by_autograd(image, text, labels), rtol=1e-10, atol=0)


def test_at_unit_norm_it_is_the_probability_alone():
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


def test_shares_by_rank():
    """As one would write it: sort each image's classes, the true one ahead, and average the shares."""
    image, text, labels = embeddings()
    norms, expected = by_autograd(image, text, labels), torch.zeros(C, dtype=torch.float64)
    cosine = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    for b in range(B):
        label = int(labels[b])
        others = sorted(set(range(C)) - {label}, key=lambda c: -cosine[b, c])  # noqa: B023 - sorted at once
        expected += norms[b, [label, *others]] / norms[b].sum() / B
    spread = gradient_spread(image, text, labels, SCALE)
    torch.testing.assert_close(spread.share, expected, rtol=1e-10, atol=0)
    assert spread.images == B
    assert spread.share.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(spread.cumulative, torch.cumsum(expected, 0), rtol=1e-10, atol=0)


def test_images_in_chunks_of_any_size(monkeypatch):
    image, text, labels = embeddings()
    expected = gradient_spread(image, text, labels, SCALE).share
    monkeypatch.setattr("skipkernels.experiments.sensitivity.gradient_dependence._CHUNK", 4)
    torch.testing.assert_close(gradient_spread(image, text, labels, SCALE).share, expected, rtol=1e-12, atol=0)


def test_of_an_image_that_is_all_but_certain_a_share_is_left():
    """1 − p_y is 1e-40 here, and would be 0 if it were subtracted."""
    text = torch.eye(3, 4, dtype=torch.float64)
    image = torch.tensor([[1.0, 0.1, 0.0, 1.0]], dtype=torch.float64)
    spread = gradient_spread(image, text, torch.tensor([0]), 150.0)
    cosine = F.normalize(image, dim=1)[0, :3]
    others = (150 * (cosine - cosine[0])).exp()[1:]
    norms = torch.cat([others.sum()[None], others]) * (1 - cosine**2).sqrt()
    assert others.sum() < 1e-35
    torch.testing.assert_close(spread.share, norms / norms.sum(), rtol=1e-9, atol=0)


def test_an_image_without_a_gradient_is_left_out():
    text = torch.eye(3, dtype=torch.float64)
    image = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.4, 0.1]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    spread = gradient_spread(image, text, labels, 2000.0)  # exp(−2000) is 0
    assert spread.images == 1
    torch.testing.assert_close(spread.share, gradient_spread(image[1:], text, labels[1:], 2000.0).share)
    with pytest.raises(InputError, match="no image has a gradient"):
        gradient_spread(image[:1], text, labels[:1], 2000.0)


def test_what_is_kept_is_what_the_published_policy_keeps_on_average():
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(40, generator=generator, dtype=torch.float64).sort(descending=True).values
    spread = GradientSpread(share / share.sum(), images=1)
    setting = {"keep_ratio": 0.2, "max_keep": 50, "decay": 1.0}
    shares = torch.stack(
        [spread.share[RankSampler(**setting, tail="fixed", generator=generator).draw(40, 4)].sum() for _ in range(2000)]
    )
    kept = spread.kept(**setting, batch_size=4)
    assert kept.always == 8 and kept.expected == RankSampler(**setting).expected_keep(40, 4)
    assert abs(kept.share - shares.mean().item()) < 4 * shares.std().item() / 2000**0.5
    assert shares.std() > 0.01, "the tail is drawn"


def test_a_batch_of_more_classes_than_always_stay_keeps_them_all():
    spread = GradientSpread(torch.full((10,), 0.1, dtype=torch.float64), images=1)
    assert spread.kept(keep_ratio=0.1, max_keep=50, decay=0.3, batch_size=7).always == 7
    every = spread.kept(keep_ratio=1.0, max_keep=2, decay=0.3)
    assert every.always == every.expected == 10 and every.share == pytest.approx(1)


def test_ranks_for_a_share():
    spread = GradientSpread(torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64), images=1)
    assert [spread.ranks_for(share) for share in (0.0, 0.5, 0.51, 0.75, 0.876, 1.0)] == [1, 1, 2, 2, 4, 4]
    tenths = GradientSpread(torch.full((10,), 0.1, dtype=torch.float64), images=1)
    assert [tenths.ranks_for(n / 10) for n in range(1, 11)] == list(range(1, 11)), "sums of tenths round"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.ones(B, D + 1)}, r"image must be \[B, D\] and text \[C, D\]"),
        ({"image": torch.ones(D)}, r"image must be \[B, D\]"),
        ({"text": torch.ones(1, D)}, "two classes or more; got 1"),
        ({"labels": torch.zeros(B)}, r"labels must be int64 \[B=6\]"),
        ({"labels": torch.zeros(B - 1, dtype=torch.int64)}, r"labels must be int64 \[B=6\]"),
        ({"labels": torch.full((B,), C)}, r"labels must be in \[0, C=9\); got 9 to 9"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(changes, message):
    image, text, labels = embeddings()
    with pytest.raises(InputError, match=message):
        gradient_spread(**({"image": image, "text": text, "labels": labels, "logit_scale": SCALE} | changes))
