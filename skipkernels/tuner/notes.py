"""What a run says of settings that are easily mistaken, and of a result that is hardly one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..data import Task
from .config import TuneConfig


def of_settings(config: TuneConfig) -> tuple[str, ...]:
    """Notes on settings: `--skip-layers 1` is one block, and 1.0 all of them."""
    skip = config.skip_layers
    if config.method != "skip" or skip != 1:
        return ()
    if isinstance(skip, int):
        return ("--skip-layers 1 skips one block of each tower; 1.0 would skip every block.",)
    return ("--skip-layers 1.0 skips every block of each tower; 1 would skip one block.",)


def weak_result(
    config: TuneConfig, task: Task, zero_shot: Mapping[str, float | None], tuned: Mapping[str, float | None]
) -> str | None:
    """A warning if the classes that trained are below zero-shot, or within two standard errors of chance.

        chance = 1 / C,   standard error = √(chance · (1 − chance) / n)   for n test images of C classes

    Args:
        config: The run, resolved.
        task: Its task; the classes of the first test are those that trained.
        zero_shot: Per cent, by test, before tuning.
        tuned: The same after it.
    """
    test = task.tests[0]
    before, after = zero_shot.get(test.name), tuned.get(test.name)
    if not config.epochs or before is None or after is None:
        return None
    chance = 1 / len(test.classes)
    limit = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / len(test.images)))
    if after < before:
        what, how = f"below zero-shot ({before:.2f} %)", "Lower"
    elif after <= limit and after < 100:
        images = f"{len(test.images)} images, within two standard errors"
        what, how = f"not above chance ({100 * chance:.2f} % of {images})", "Raise"
    else:
        return None
    rates = {"--text-lr": config.text_lr, "--image-lr": config.image_lr}
    named = " and ".join(name for name, value in rates.items() if value is not None)
    return (
        f"accuracy on the classes that trained is {after:.2f} %, {what}. {how} {named}, or try other --epochs or more "
        "--shots."
    )
