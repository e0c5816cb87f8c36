"""From both measurements to ω and a keep ratio. Rules of thumb: they say where to begin, not what is best."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...clip import blocks_to_skip
from ...data import InputError
from ...selection import base_keep
from .feature_sensitivity import FeatureShift
from .gradient_dependence import GradientSpread, Kept

STILL = 0.25  # a block is still whose FS is below this share of the largest
# Of the gradient. Less looks harmless and is not: what a step leaves out adds up over a run. glyph-tiny, 50 classes, 8
# shots, 4 epochs, mean of 3 seeds, for the ranks with 95.5, 99.3, 99.9 and 100 % of the gradient: 58.5, 63.5, 64.6 and
# 65.2 % of the test images right after tuning. On Greek, of which it has seen no character, 99.9 % is not enough:
# 53.2 against 60.8 at the default, one seed.
ENOUGH = 0.999


@dataclass(frozen=True)
class Setting:
    """A setting of Skip Tuning, and what the measurements say of it.

    Attributes:
        skip_layers: ω of the image and of the text tower.
        keep_ratio: As `tune` takes it.
        max_keep: As `tune` takes it.
        shift: FS of the last skipped block of each tower as a share of the largest; 0 where nothing is skipped.
        kept: Classes of a step, and the share of the gradient that they have.
    """

    skip_layers: tuple[int, int]
    keep_ratio: float
    max_keep: int
    shift: tuple[float, float]
    kept: Kept


@dataclass(frozen=True)
class Advice:
    """What suits the model by the rules of `advise`, beside another setting.

    Attributes:
        advised: The setting.
        other: What it is compared with.
        skip_share: The largest share of the blocks, to three digits, by which no tower skips more than in `advised`.
        notes: What a user should know of the advice.
    """

    advised: Setting
    other: Setting
    skip_share: float
    notes: tuple[str, ...]


def still_blocks(shift: list[float], share: float = STILL) -> int:
    """ω: the largest number of first blocks of which each has an FS below a share of the largest.

    >>> still_blocks([0.1, 0.2, 0.3, 0.2, 1.0])
    2
    """
    limit = share * max(shift)
    return next((block for block, value in enumerate(shift) if value >= limit), len(shift))


def advise(
    shift: FeatureShift,
    spread: GradientSpread,
    *,
    skip_layers: int | float = 0.5,
    keep_ratio: float = 0.5,
    max_keep: int = 50,
    decay: float = 0.3,
    batch_size: int = 1,
) -> Advice:
    """Which ω and keep ratio suit, beside a setting to compare with.

    ω: the largest number of first blocks whose FS stays below a quarter of the largest FS of that tower. What is below
    the cut is frozen, so full fine-tuning should hardly have moved it. Where even the first block is above that, FS is
    too flat to tell: the ω to compare with stays, and a note says so. Keep ratio: m / C with the least m whose first m
    ranks have 99.9 % of the gradient. These are rules of thumb, and none sees how accurate the tuned model is: try the
    setting beside the default.

    Args:
        shift: FS.
        spread: GD.
        skip_layers: To compare with: blocks skipped in each tower, or a share of them.
        keep_ratio: To compare with.
        max_keep: To compare with; raised in the advised setting where more classes are needed.
        decay: λ of the tail, of both.
        batch_size: Images of a step, each of which may need a class of its own.

    Raises:
        InputError: If nothing moved in a tower, or `skip_layers` is more than it has blocks.

    Example:
        >>> import torch
        >>> shift = FeatureShift([0.01, 0.02, 0.1, 0.2], [0.01, 0.1], [0.0] * 4, [0.0] * 2, 0.01, 0.01)
        >>> share = torch.tensor([0.5, 0.3, 0.1995, 0.0005], dtype=torch.float64)
        >>> advice = advise(shift, GradientSpread(share, images=1))
        >>> advice.advised.skip_layers, advice.advised.keep_ratio, advice.other.kept.always
        ((2, 1), 0.75, 2)
    """
    towers = {"image": shift.image, "text": shift.text}
    for name, values in towers.items():
        if max(values) == 0:
            raise InputError(
                f"advise: no block of the {name} tower moved in fine-tuning. Use a higher learning rate or more epochs."
            )

    def setting(blocks: list[int], keep_ratio: float, max_keep: int) -> Setting:
        last = [
            values[skip - 1] / max(values) if skip else 0.0
            for values, skip in zip(towers.values(), blocks, strict=True)
        ]
        kept = spread.kept(keep_ratio=keep_ratio, max_keep=max_keep, decay=decay, batch_size=batch_size)
        return Setting((blocks[0], blocks[1]), keep_ratio, max_keep, (last[0], last[1]), kept)

    try:
        blocks = [blocks_to_skip(skip_layers, len(values), name) for name, values in towers.items()]
    except ValueError as error:
        raise InputError(str(error)) from error
    still, notes = [], []
    for (name, values), skip in zip(towers.items(), blocks, strict=True):
        still.append(still_blocks(values) or skip)
        if still_blocks(values) == 0:
            first = f"{100 * values[0] / max(values):.0f} % of the largest"
            notes.append(
                f"{name} tower: FS of the first block is {first}, so FS is too flat to tell where to cut; ω stays at "
                f"{skip}, as in the setting to compare with."
            )
    classes, least = len(spread.share), spread.ranks_for(ENOUGH)
    advised, other = setting(still, _ratio(least, classes), max(max_keep, least)), setting(blocks, keep_ratio, max_keep)
    if advised.kept.always < other.kept.always:
        notes.append(
            "GD is that of the model before tuning; fewer classes in a step can cost accuracy that it does not show: "
            "try both settings."
        )
    return Advice(
        advised=advised,
        other=other,
        skip_share=min(math.floor(1000 * skip / len(v)) / 1000 for skip, v in zip(still, towers.values(), strict=True)),
        notes=tuple(notes),
    )


def _ratio(keep: int, classes: int) -> float:
    """The keep ratio of so many classes, to four digits where it gives exactly them.

    >>> _ratio(2, 3), _ratio(1, 3), _ratio(3, 3)
    (0.6666, 0.3333, 1.0)
    """
    short = math.floor(1e4 * keep / classes) / 1e4  # rounded up it would give one more
    return short if short > 0 and base_keep(classes, short, keep) == keep else keep / classes
