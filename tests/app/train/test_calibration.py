"""Calibration of probabilities: the temperature, "none of these", and thresholds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from skipkernels.app.train.calibration import class_probabilities, find_thresholds, fit_none_logit, fit_temperature


@pytest.fixture
def logits() -> torch.Tensor:
    return 30 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))


def test_temperature_is_the_minimum(logits):
    labels = torch.where(torch.rand(200, generator=torch.Generator().manual_seed(1)) < 0.7, logits.argmax(1), 0)
    best = fit_temperature(logits, labels)

    def loss(temperature: float) -> float:
        return F.cross_entropy(logits.double() / temperature, labels, label_smoothing=2 / 202).item()

    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.99, 1.01, 2))
    all_correct = fit_temperature(logits, logits.argmax(1))
    assert 0.01 < all_correct < best  # not certain, however many are correct


def test_temperature_of_one_class_is_one(logits):
    assert fit_temperature(logits[:, :1], torch.zeros(200, dtype=torch.int64)) == 1


def test_none_is_one_more_class():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    energy = (logits / 2).logsumexp(dim=1)
    none_logit = fit_none_logit(logits, 2.0)
    assert (energy < none_logit).double().mean().item() == pytest.approx(0.06)  # of 50: below the 5 % quantile are 3
    found = class_probabilities(logits, 2.0, none_logit)
    expected = (logits / 2).softmax(dim=1) * (energy - none_logit).sigmoid()[:, None]
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


# Labels of five images that are classified as 0 with these probabilities; the thresholds for accuracies of 90, 95 and
# 99 %, and for 95 % of the images: threshold, share of the images that is kept, and accuracy of those.
BEST = [0.9, 0.8, 0.7, 0.605, 0.95]
NOT_REACHED = (None, None, None)
EVERYTHING = 0.6  # without one of five images, 80 % would be kept
THRESHOLDS = {
    "three right": ([0, 1, 0, 1, 0], [(0.81, 40.0, 100.0)] * 3 + [(EVERYTHING, 100.0, 60.0)]),
    "all wrong": ([1, 1, 1, 1, 1], [NOT_REACHED] * 3 + [(EVERYTHING, 100.0, 0.0)]),
    "all right": ([0, 0, 0, 0, 0], [(0.0, 100.0, 100.0)] * 3 + [(EVERYTHING, 100.0, 100.0)]),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_by_hand(name):
    labels, expected = THRESHOLDS[name]
    best = torch.tensor(BEST)
    rows = find_thresholds(torch.stack([best, 1 - best], dim=1), torch.tensor(labels))
    wanted = [("accuracy", 90.0), ("accuracy", 95.0), ("accuracy", 99.0), ("coverage", 95.0)]
    assert [(row["wanted"], row["target"]) for row in rows] == wanted
    assert [(row["threshold"], row["coverage"], row["accuracy"]) for row in rows] == expected
