"""Linear probe: minimum, sweep of the penalty, and known classes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from skipkernels.app.heads import Head
from skipkernels.app.heads.logistic import logistic_regression
from skipkernels.app.methods import linear_probe
from tests.app.methods.method_tasks import BASE, made, stacked, tiny_model, tiny_task, trained

IDENTITY = torch.eye(5, 12, dtype=torch.float64)


def points() -> tuple[torch.Tensor, torch.Tensor]:
    """60 images in 6 dimensions around the centers of 4 classes, and their labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    centers = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return centers[labels] + torch.randn(60, 6, generator=generator, dtype=torch.float64), labels


def fit(image: torch.Tensor, labels: torch.Tensor, classes: int, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the usual regression."""
    anchor = image.new_zeros(classes, image.shape[1])
    return logistic_regression(image, labels, anchor, l2, bias=True, tolerance=1e-6 * len(image))[:2]


@pytest.mark.parametrize("l2", [1e-3, 1.0, 1e4])
def test_linear_probe_finds_minimum(l2):
    """The problem is strictly convex in the weight: a zero gradient is the minimum."""
    image, labels = points()
    weight, bias = (x.requires_grad_() for x in fit(image, labels, 4, l2))
    z = image @ weight.T + bias
    loss = (z.exp().sum(dim=1).log() - z[torch.arange(60), labels]).sum() + l2 / 2 * (weight**2).sum()
    loss.backward()
    # The solver's tolerance, on the mean loss of 60 images, and the effect of changing the weight by a factor 1 + 1e-4.
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 60 * 1e-6 + 1e-4 * l2 * weight.abs().max()
    assert bias.detach().abs().max() < 10 and weight.detach().abs().max() > 0


def test_linear_probe_fit_and_logits(monkeypatch):
    chosen, choose = [], linear_probe._choose
    monkeypatch.setattr(linear_probe, "_choose", lambda *given: chosen.append(choose(*given)) or chosen[0])
    method = made("linear-probe")
    embeddings = method.encode_frozen(stacked(method.task.train)[0])
    assert embeddings.shape == (20, 12)
    trained(method)
    weight, bias = fit(embeddings, stacked(method.task.train)[1], 5, chosen[0])
    assert method.fitted.weight.equal(weight) and method.fitted.bias.equal(bias)
    images = stacked(method.task.tests[0].images)[0]
    image = method.model.encode_image(images).detach()
    torch.testing.assert_close(method.logits("base", image), image @ weight.T + bias)
    assert method.logits("base", images).equal(method.logits("base", method.encode_frozen(images)))
    right = (method.logits("base", image).argmax(dim=1) == stacked(method.task.tests[0].images)[1]).double().mean()
    assert right > 0.8


def swept(monkeypatch, weight) -> list[float]:
    """Decimal exponents of the penalties that are tried, and the chosen one, if a fit gives weight(exponent)."""
    tried = []

    def regression(image, labels, anchor, l2, **options):
        tried.append(round(math.log10(l2), 6))
        return weight(tried[-1]), torch.zeros(5, dtype=torch.float64), None

    monkeypatch.setattr(linear_probe, "logistic_regression", regression)
    method, labels = made("linear-probe"), torch.arange(5).repeat(4)
    method.fit(IDENTITY[labels], labels)
    return tried


def test_linear_probe_sweep(monkeypatch):
    """Seven penalties two decades apart; then, with half the distance each time, one on each side of the best."""
    coarse = [-6, -4, -2, 0, 2, 4, 6]
    tried = swept(monkeypatch, lambda exponent: IDENTITY / (1 + abs(exponent - 1.3)))
    assert tried == [*coarse, 1, 3, 0.5, 1.5, 1.25, 1.75, 1.125, 1.375, 1.25]
    assert swept(monkeypatch, lambda exponent: IDENTITY * exponent) == [*coarse, 5, 5.5, 5.75, 5.875, 6], "in range"

    def accurate(exponent: float) -> torch.Tensor:
        """All correct at 4, with low confidence; else four are confident, and the fifth is nearly correct."""
        nearly = 5 * IDENTITY
        nearly[1, 0] = 5.01
        return 0.01 * IDENTITY if exponent == 4 else nearly

    assert swept(monkeypatch, accurate)[-1] == 4, "accuracy precedes the loss"


def test_linear_probe_fits_in_fp64(monkeypatch):
    """Also under autocast."""
    monkeypatch.setattr(linear_probe, "_choose", lambda *_: 0.5)
    method = made("linear-probe", tiny_model(dtype=torch.float32))
    images, labels = stacked(method.task.train)
    embeddings = method.encode_frozen(images.float())
    with torch.autocast("cpu", torch.bfloat16):
        method.fit(embeddings, labels)
    weight, _ = fit(embeddings.double(), labels, 5, 0.5)
    assert method.fitted.weight.dtype == torch.float32 and method.fitted.weight.equal(weight.float())
    assert F.cross_entropy(method.logits("base", embeddings), labels) < math.log(5) / 2


def test_linear_probe_one_shot_has_no_sweep():
    method = made("linear-probe", task=tiny_task(shots=1))
    trained(method)
    images, labels = stacked(method.task.train)
    assert method.fitted.weight.equal(fit(method.encode_frozen(images), labels, 5, 1 / 0.316)[0])
    note = "linear-probe: no class has two training images, so none is held out to choose l2; it is 3.16."
    assert method.notes == [note]


def test_linear_probe_logits_of_known_classes():
    some = [BASE[3], BASE[0]]
    method = made("linear-probe", task=tiny_task(new=some))
    trained(method)
    images = stacked(method.task.train)[0]
    expected = method.logits("base", images)[:, [3, 0]]
    torch.testing.assert_close(method.logits("new", images), expected, rtol=1e-12, atol=1e-12)  # sums in another order
    other = made("linear-probe", task=tiny_task(new=[*some, "yew"]))
    other.use_head(method.fitted, BASE)
    assert other.logits("new", images) is None
    twins = ["yew", "yew", "ash"]
    method = made("linear-probe", task=tiny_task(base=twins, new=twins))
    method.use_head(Head(torch.zeros(3, 12, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0])), twins)
    assert method.logits("new", images)[0].tolist() == [1.0, 2.0, 3.0], "two classes with one name stay separate"
