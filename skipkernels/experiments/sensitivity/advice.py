"""Suggest ω and a keep ratio from FS and GD, by rules of thumb that ignore the accuracy of the tuned model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...clip import blocks_to_skip
from ...data import InputError
from ...selection import base_keep
from .feature_sensitivity import FeatureSensitivity
from .gradient_dependence import GradientDependence, KeptClasses

INSENSITIVE_BELOW = 0.25  # share of the largest FS below which a block counts as insensitive
# Share of the gradient that the kept classes must have. A smaller share costs accuracy, because the omitted gradient
# accumulates over a run. Test accuracy of glyph-tiny on 50 classes, 8 shots, 4 epochs, mean of 3 seeds: 58.5, 63.5,
# 64.6 and 65.2 % with the ranks that have 95.5, 99.3, 99.9 and 100 % of the gradient. On Greek, which is not in its
# training data, 99.9 % is not enough: 53.2 % against 60.8 % with the default setting, one seed.
GRADIENT_SHARE = 0.999


@dataclass(frozen=True)
class Setting:
    """A setting of Skip Tuning and its FS and GD.

    Attributes:
        skip_layers: ω of the image tower and of the text tower.
        keep_ratio: See `TuneConfig`.
        max_keep: See `TuneConfig`.
        sensitivity: FS of the last skipped block of each tower, as a share of the tower's largest; else 0.
        kept: Number of kept classes and their share of the gradient.
    """

    skip_layers: tuple[int, int]
    keep_ratio: float
    max_keep: int
    sensitivity: tuple[float, float]
    kept: KeptClasses


@dataclass(frozen=True)
class Advice:
    """The setting suggested by `advise`, and the setting it is compared with.

    Attributes:
        advised: The suggested setting.
        other: The setting to compare with.
        skip_share: Largest `skip_layers`, as a share to three digits, with which no tower skips more blocks than in
            `advised`.
        notes: Caveats to show to the user.
    """

    advised: Setting
    other: Setting
    skip_share: float
    notes: tuple[str, ...]


def insensitive_blocks(sensitivity: list[float], share: float = INSENSITIVE_BELOW) -> int:
    """Return the number of first blocks of a tower that all have an FS below a share of the largest.

    >>> insensitive_blocks([0.1, 0.2, 0.3, 0.2, 1.0])
    2
    """
    limit = share * max(sensitivity)
    return next((block for block, value in enumerate(sensitivity) if value >= limit), len(sensitivity))


def advise(
    sensitivity: FeatureSensitivity,
    dependence: GradientDependence,
    *,
    skip_layers: int | float = 0.5,
    keep_ratio: float = 0.5,
    max_keep: int = 50,
    decay: float = 0.3,
    batch_size: int = 1,
    max_tail: int | None = None,
) -> Advice:
    """Suggest ω and a keep ratio, and compare them with another setting.

    ω is the number of first blocks with an FS below a quarter of the largest FS of the tower: blocks below the cut are
    frozen, so full fine-tuning should hardly change them. If even the first block is above that limit, FS does not
    determine a cut; ω is then that of the setting to compare with, and a note says so. The keep ratio is m / C with the
    smallest m such that the first m ranks have 99.9 % of the gradient. Both are rules of thumb that ignore the accuracy
    of the tuned model: also try the default setting.

    Args:
        sensitivity: FS of the model.
        dependence: GD of the model.
        skip_layers: Number or share of blocks skipped in each tower, in the setting to compare with.
        keep_ratio: Keep ratio of the setting to compare with.
        max_keep: `max_keep` of the setting to compare with. The suggested setting has a larger one if it needs it.
        decay: λ of the tail in both settings.
        batch_size: Images per step. Each may be of a different class, which must be kept.
        max_tail: Bound on the expected number of classes of the tail in both settings; default none.

    Raises:
        InputError: If no block of a tower changed, or `skip_layers` exceeds the number of blocks.

    Example:
        >>> import torch
        >>> sensitivity = FeatureSensitivity([0.01, 0.02, 0.1, 0.2], [0.01, 0.1], [0.0] * 4, [0.0] * 2, 0.01, 0.01)
        >>> share = torch.tensor([0.5, 0.3, 0.1995, 0.0005], dtype=torch.float64)
        >>> advice = advise(sensitivity, GradientDependence(share, images=1))
        >>> advice.advised.skip_layers, advice.advised.keep_ratio, advice.other.kept.always
        ((2, 1), 0.75, 2)
    """
    towers = {"image": sensitivity.image, "text": sensitivity.text}
    for name, values in towers.items():
        if max(values) == 0:
            raise InputError(
                f"advise: no block of the {name} tower changed in fine-tuning. Use a higher learning rate or more "
                "epochs."
            )

    def setting(blocks: list[int], keep_ratio: float, max_keep: int) -> Setting:
        last = [
            values[skip - 1] / max(values) if skip else 0.0
            for values, skip in zip(towers.values(), blocks, strict=True)
        ]
        kept = dependence.kept(
            keep_ratio=keep_ratio, max_keep=max_keep, decay=decay, batch_size=batch_size, max_tail=max_tail
        )
        return Setting((blocks[0], blocks[1]), keep_ratio, max_keep, (last[0], last[1]), kept)

    try:
        blocks = [blocks_to_skip(skip_layers, len(values), name) for name, values in towers.items()]
    except ValueError as error:
        raise InputError(str(error)) from error
    insensitive, notes = [], []
    for (name, values), skip in zip(towers.items(), blocks, strict=True):
        insensitive.append(insensitive_blocks(values) or skip)
        if insensitive_blocks(values) == 0:
            first = f"{100 * values[0] / max(values):.0f} % of the largest"
            notes.append(
                f"{name} tower: FS of the first block is {first}, too flat to suggest a cut; ω stays at {skip}, as in "
                "the setting to compare with."
            )
    classes, ranks = len(dependence.share), dependence.ranks_for(GRADIENT_SHARE)
    advised = setting(insensitive, _ratio(ranks, classes), max(max_keep, ranks))
    other = setting(blocks, keep_ratio, max_keep)
    if advised.kept.always < other.kept.always:
        notes.append(
            "GD is measured before tuning. Keeping fewer classes can cost accuracy that GD does not show: try both "
            "settings."
        )
    shares = [skip / len(values) for skip, values in zip(insensitive, towers.values(), strict=True)]
    return Advice(advised, other, min(math.floor(1000 * share) / 1000 for share in shares), tuple(notes))


def _ratio(keep: int, classes: int) -> float:
    """Return a keep ratio that keeps exactly `keep` classes, with four digits if they suffice.

    >>> _ratio(2, 3), _ratio(1, 3), _ratio(3, 3)
    (0.6666, 0.3333, 1.0)
    """
    short = math.floor(1e4 * keep / classes) / 1e4  # rounding up would keep one more
    return short if short > 0 and base_keep(classes, short, keep) == keep else keep / classes
