"""Comparison of the best variant of a study with the others, on the same test images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import InputError
from ..results import predictions
from ..results.files import PREDICTIONS
from .runs import Result

Right = dict[str, np.ndarray]  # by test, the number of seeds that classify each image correctly, [n]
LEVEL = 0.05
"""Probability of calling one of the others worse by chance, if all are equally good; shared out by Bonferroni."""
_DRAWS = 10_000


def compare_best(results: Sequence[Result], folder: Path, test: str) -> dict[str, Any] | None:
    """Compare the variant with the best mean accuracy with each other one, in pairs, on the same images.

    Another variant is worse if the best is ahead of it in every seed, and a permutation test over the images gives
    p < 0.05 / number of others: each image swaps its results (of all seeds) between the two with probability one half,
    and p is the share of swaps with a difference at least as large. With one seed this is McNemar's exact test, but for
    the number of draws.

    Args:
        results: Runs, with the same seeds for all variants.
        folder: Folder of the study, in which the predictions of the runs are read.
        test: Test, or summary of a protocol, of which the accuracy is compared.

    Returns:
        "test", "best", and for each of the "others" by name "difference" (mean over the seeds), "p", "every_seed" and
        "worse"; None if predictions are missing, or are not of the same images.
    """
    by_seed = _accuracies(results, test)
    right = _read([result for result in results if result.variant in by_seed], folder)
    if right is None or len(by_seed) < 2:
        return None
    means = {variant: sum(of.values()) / len(of) for variant, of in by_seed.items()}
    best = max(means, key=lambda variant: means[variant])
    others = {}
    for name in (name for name in means if name != best):
        p = permutation_p(right[best], right[name], len(by_seed[best]), test)
        every = all(accuracy > by_seed[name][seed] for seed, accuracy in by_seed[best].items())
        worse = every and p < LEVEL / (len(means) - 1)
        others[name] = {"difference": means[best] - means[name], "p": p, "every_seed": every, "worse": worse}
    return {"test": test, "best": best, "others": others}


def _accuracies(results: Sequence[Result], test: str) -> dict[str, dict[int, float]]:
    """Return the accuracies by variant and seed, of the variants that have one for every seed."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        if (value := (result.metrics["tuned"] or {}).get(test)) is not None:
            found.setdefault(result.variant, {})[result.seed] = value
    seeds = {result.seed for result in results}
    return {variant: by_seed for variant, by_seed in found.items() if by_seed.keys() == seeds}


def _read(results: Sequence[Result], folder: Path) -> dict[str, Right] | None:
    """Read the predictions of the runs; None if one has none, or if the runs have other test images."""
    found: dict[str, Right] = {}
    labels: dict[str, list[int]] = {}
    try:
        for result in results:
            for test in predictions.load(folder / result.folder / PREDICTIONS):
                if labels.setdefault(test.name, test.labels.tolist()) != test.labels.tolist():
                    return None
                right = (test.last.classes[:, 0] == test.labels).long().numpy()
                of_variant = found.setdefault(result.variant, {})
                of_variant[test.name] = of_variant.get(test.name, 0) + right
    except InputError:  # a run may have no predictions: they are written with its report, which may fail
        return None
    return found


def permutation_p(first: Right, second: Right, seeds: int, test: str) -> float:
    """Return the p-value of the difference of two variants in a test, or in the harmonic mean of base and new.

    The latter is that of the accuracies over all seeds; the difference that a study shows is of means over the seeds.

    >>> equal, better = {"all": np.array([1, 1, 0, 0])}, {"all": np.array([1, 1, 1, 0])}
    >>> permutation_p(better, equal, 1, "all")  # one image differs, whatever is swapped
    1.0
    """
    generator = np.random.default_rng(0)
    sides: tuple[Right, Right] = {}, {}  # accuracies by test, [1 + draws]; the first without a swap
    for name in first:
        moved = np.zeros(1 + _DRAWS)  # correct results that change sides
        values, counts = np.unique(first[name] - second[name], return_counts=True)
        for value, count in zip(values, counts, strict=True):
            moved[1:] += value * generator.binomial(count, 0.5, size=_DRAWS)
        whole = len(first[name]) * seeds
        sides[0][name] = 100 * (first[name].sum() - moved) / whole
        sides[1][name] = 100 * (second[name].sum() + moved) / whole
    one, other = (side[test] if test in side else _harmonic(**side) for side in sides)
    differences = np.abs(one - other)
    as_large = differences[1:] >= differences[0] - 1e-9  # equal differences may differ by rounding
    return float((1 + as_large.sum()) / (1 + _DRAWS))


def _harmonic(base: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Harmonic means of accuracies, as `summarise`."""
    return 2 * base * new / np.maximum(base + new, 1e-9)
