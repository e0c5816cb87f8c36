"""Suggested settings from synthetic FS and GD."""

from __future__ import annotations

import pytest
import torch

from skipkernels.clip import blocks_to_skip
from skipkernels.data import InputError
from skipkernels.experiments.sensitivity import FeatureSensitivity, GradientDependence, advise, insensitive_blocks
from skipkernels.experiments.sensitivity.advice import _ratio as ratio
from skipkernels.selection import base_keep

GROWING = [0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0]


def curves(image: list[float], text: list[float]) -> FeatureSensitivity:
    return FeatureSensitivity(image, text, [0.0] * len(image), [0.0] * len(text), 0.0, 0.0)


def geometric(classes: int, factor: float) -> GradientDependence:
    share = factor ** torch.arange(classes, dtype=torch.float64)
    return GradientDependence(share / share.sum(), images=1)


@pytest.mark.parametrize(
    ("sensitivity", "blocks"),
    [
        (GROWING, 7),
        (GROWING[::-1], 0),
        ([0.25, 1.0], 0),
        ([0.249, 1.0], 1),
        ([0.1, 0.3, 0.1, 1.0], 1),
        ([1.0, 1.0], 0),
        ([0.0, 0.0, 1.0], 2),
    ],
)
def test_insensitive_blocks(sensitivity, blocks):
    assert insensitive_blocks(sensitivity) == blocks


def test_advise_sensitivity_growing_with_depth():
    advice = advise(curves(GROWING, GROWING[6:]), geometric(100, 0.5))
    assert advice.advised.skip_layers == (7, 1) and advice.other.skip_layers == (6, 3)
    assert advice.advised.sensitivity == (0.2, 0.2) and advice.other.sensitivity == (0.12, 0.45)
    assert advice.skip_share == 0.166
    # 1 − 2⁻¹⁰ = 0.99902 is the first of the sums 0.5, 0.75, … that reaches 0.999.
    assert advice.advised.kept.always == 10 and advice.advised.keep_ratio == 0.1
    assert advice.other.kept.always == 50
    assert advice.advised.kept.share > 1 - 2**-10


def test_advise_flat_sensitivity_keeps_other_cut_with_note():
    advice = advise(curves(GROWING, [0.5, 0.6, 0.7, 1.0]), geometric(10, 0.5), skip_layers=3)
    assert advice.advised.skip_layers == (7, 3) and advice.advised.sensitivity[1] == 0.7
    (note,) = advice.notes
    assert note.startswith("text tower: FS of the first block is 50 % of the largest") and "ω stays at 3" in note


def test_advise_fewer_classes_adds_note():
    fewer = advise(curves(GROWING, GROWING), geometric(100, 0.5))
    (note,) = fewer.notes
    assert note.startswith("GD is measured before tuning")
    assert advise(curves(GROWING, GROWING), geometric(100, 0.5), keep_ratio=0.1).notes == ()


def test_advise_other_without_skipped_blocks():
    other = advise(curves(GROWING, GROWING), geometric(10, 0.5), skip_layers=0).other
    assert other.skip_layers == (0, 0) and other.sensitivity == (0.0, 0.0)


def test_advise_raises_max_keep():
    share = torch.zeros(200, dtype=torch.float64)
    share[:190] = 1 / 190
    advice = advise(curves(GROWING, GROWING), GradientDependence(share, images=1))
    assert advice.advised.kept.always == advice.advised.max_keep == 190 and advice.advised.keep_ratio == 0.95
    assert advice.other.max_keep == advice.other.kept.always == 50
    assert advise(curves(GROWING, GROWING), geometric(200, 0.5)).advised.max_keep == 50


def test_advise_bounds_the_tail():
    plain, bounded = (advise(curves(GROWING, GROWING), geometric(1000, 0.99), max_tail=tail) for tail in (None, 3))
    for setting, other in [(bounded.advised, plain.advised), (bounded.other, plain.other)]:
        assert setting.kept.expected == setting.kept.always + 3 < other.kept.expected
        assert setting.kept.share < other.kept.share


def test_ratio_keeps_exact_number():
    for classes in (*range(2, 60), 100, 397, 1000, 21841):
        for keep in range(1, classes + 1, max(1, classes // 300)):
            assert base_keep(classes, ratio(keep, classes), classes) == keep, (keep, classes)
    assert ratio(5, 50) == 0.1 and ratio(1, 3) == 0.3333


def test_advise_skip_share_skips_no_more_than_advised():
    for image_depth in (4, 6, 12, 24, 40):
        for image in range(1, image_depth):
            sensitivity = curves([0.0] * image + [1.0] * (image_depth - image), [0.0] * 11 + [1.0])
            advice = advise(sensitivity, geometric(5, 0.5))
            assert advice.advised.skip_layers == (image, 11)
            skipped = [blocks_to_skip(advice.skip_share, depth, "") for depth in (image_depth, 12)]
            assert skipped[0] <= image and skipped[1] <= 11
            assert image / image_depth > 11 / 12 or skipped[0] == image, "the smaller of the two is reached"


@pytest.mark.parametrize(
    ("sensitivity", "changes", "message"),
    [
        (curves(GROWING, [0.0, 0.0]), {}, "no block of the text tower changed"),
        (curves(GROWING, GROWING), {"skip_layers": 13}, "skip_layers must be a whole number from 0 to 12"),
    ],
)
def test_advise_bad_input(sensitivity, changes, message):
    with pytest.raises(InputError, match=message):
        advise(sensitivity, geometric(10, 0.5), **changes)
