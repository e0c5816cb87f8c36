"""Linear probe: minimum, search of the penalty, and known classes."""

from __future__ import annotations

import math

import pytest
import torch

from skipkernels.app.heads import Head
from skipkernels.app.methods import linear_probe
from tests.app.methods.method_tasks import BASE, made, stacked, tiny_model, tiny_task, trained

IDENTITY = torch.eye(5, 12, dtype=torch.float64)


@pytest.mark.parametrize("l2", [1e-3, 1.0, 1e4])
def test_fit_is_the_minimum(l2):
    """The problem is strictly convex in the weight: a zero gradient is the minimum."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 4
    centers = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    image = centers[labels] + torch.randn(60, 6, generator=generator, dtype=torch.float64)
    weight, bias = (x.requires_grad_() for x in linear_probe._fit(image, labels, 4, l2))
    z = image @ weight.T + bias
    loss = (z.exp().sum(dim=1).log() - z[torch.arange(60), labels]).sum() + l2 / 2 * (weight**2).sum()
    loss.backward()
    # The solver's tolerance, on the mean loss of 60 images, and the effect of changing the weight by a factor 1 + 1e-4.
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 60 * 1e-6 + 1e-4 * l2 * weight.abs().max()
    assert bias.detach().abs().max() < 10 and weight.detach().abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_linear_probe_fits_all_images_in_fp64(monkeypatch, dtype):
    """With the chosen penalty, also under autocast."""
    monkeypatch.setattr(linear_probe, "_choose", lambda *_: 0.5)
    method = made("linear-probe", tiny_model(dtype=dtype))
    images, labels = stacked(method.task.train)
    embeddings = method.encode_frozen(images.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        method.fit(embeddings, labels)
    weight, bias = (part.to(dtype) for part in linear_probe._fit(embeddings.double(), labels, 5, 0.5))
    assert method.fitted.weight.equal(weight) and method.fitted.bias.equal(bias)


def test_linear_probe_logits_are_affine_in_embeddings():
    """Embeddings are not normalized. 80 % of the test images are recognised."""
    method = made("linear-probe")
    trained(method)
    images, labels = stacked(method.task.tests[0].images)
    image = method.model.encode_image(images).detach()
    expected = image @ method.fitted.weight.T + method.fitted.bias
    for inputs in (images, image):
        torch.testing.assert_close(method.logits("base", inputs), expected)
    assert (expected.argmax(dim=1) == labels).double().mean() > 0.8


def accurate_at_4(exponent: float) -> torch.Tensor:
    """Weight that has all images correct at 4, with low confidence; else four are confident, and a fifth nearly."""
    nearly = 5 * IDENTITY
    nearly[1, 0] = 5.01
    return 0.01 * IDENTITY if exponent == 4 else nearly


@pytest.mark.parametrize(
    ("weight", "refined"),
    [
        (lambda exponent: IDENTITY / (1 + abs(exponent - 1.3)), [1, 3, 0.5, 1.5, 1.25, 1.75, 1.125, 1.375, 1.25]),
        (lambda exponent: IDENTITY * exponent, [5, 5.5, 5.75, 5.875, 6]),
        (accurate_at_4, [3, 5, 3.5, 4.5, 3.75, 4.25, 3.875, 4.125, 4]),
    ],
    ids=["loss", "end of the range", "accuracy before loss"],
)
def test_linear_probe_search_of_the_penalty(monkeypatch, weight, refined):
    """Seven penalties two decades apart; then, with half the distance each time, one on each side of the best.

    A fit gives `weight` of the exponent of the penalty. The last one is that of all images.
    """
    tried = []

    def regression(image, labels, anchor, l2, **options):
        tried.append(round(math.log10(l2), 6))
        return weight(tried[-1]), torch.zeros(5, dtype=torch.float64), None

    monkeypatch.setattr(linear_probe, "logistic_regression", regression)
    labels = torch.arange(5).repeat(4)
    made("linear-probe").fit(IDENTITY[labels], labels)
    assert tried == [-6, -4, -2, 0, 2, 4, 6, *refined]


def test_linear_probe_without_pairs_has_no_search():
    method = made("linear-probe", task=tiny_task(shots=1))
    trained(method)
    images, labels = stacked(method.task.train)
    expected, _ = linear_probe._fit(method.encode_frozen(images), labels, 5, 1 / 0.316)
    assert method.fitted.weight.equal(expected)
    note = "linear-probe: no class has two training images, so none is held out to choose l2; it is 3.16."
    assert method.notes == [note]


def test_linear_probe_classifies_trained_names_only():
    some = [BASE[3], BASE[0]]
    method = made("linear-probe", task=tiny_task(new=some))
    trained(method)
    images = stacked(method.task.train)[0]
    expected = method.logits("base", images)[:, [3, 0]]
    torch.testing.assert_close(method.logits("new", images), expected, rtol=1e-12, atol=1e-12)  # sums in another order
    other = made("linear-probe", task=tiny_task(new=[*some, "yew"]))
    other.use_head(method.fitted, BASE)
    assert other.logits("new", images) is None


def test_head_of_two_classes_with_one_name():
    twins = ["yew", "yew", "ash"]
    method = made("linear-probe", task=tiny_task(base=twins, new=twins))
    method.use_head(Head(torch.zeros(3, 12, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0])), twins)
    assert method.logits("new", stacked(method.task.train)[0])[0].tolist() == [1.0, 2.0, 3.0]
