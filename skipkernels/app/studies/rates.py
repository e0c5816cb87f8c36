"""Search of the learning rates of each method of a comparison, on the validation images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..config import RATES, TuneConfig
from ..console import plain, print_plain
from ..data.tasks import VALIDATION
from ..report.words import name_of_method
from ..train.setup import build_task
from .runs import run_variants

MULTIPLIERS = (1.0, 0.3, 3.0, 0.1, 10.0)
"""Factors of the learning rates of a method that are tried; of equal ones the first is chosen."""
SEED = 10
"""Seed of the runs of the search, which is not that of a run of the comparison."""


class Searched(NamedTuple):
    """Result of a search of the learning rates of a method."""

    rates: dict[str, Any]
    multiplier: float  # factor of the rates of the recipe
    measure: str  # "accuracy", or "balanced accuracy"
    accuracy: float  # in per cent, on the validation images
    seconds: float  # of all runs

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in self.rates.items())
        chosen = f"{rates} (×{self.multiplier:g}), {self.measure} {self.accuracy:.1f} % on validation images"
        return f"{chosen}; its runs took {self.seconds:.0f} s, without the starts of their processes"


def search_rates(
    configs: Mapping[str, TuneConfig], folder: Path, console: Console, *, overwrite: bool
) -> dict[str, Searched]:
    """Search the learning rates of each method that has some, by the same rule: the best of all `MULTIPLIERS`.

    There is no search without validation images, or if a rate is given. `configs` are configurations by method.
    """
    config = next(iter(configs.values()))
    given = any(getattr(config, name) is not None for name in RATES)
    if given or build_task(config.resolved()).validation is None:
        why = "they are given" if given else "there are no validation images"
        console.print(plain(f"note: learning rates are not searched, as {why}."))
        return {}
    tried = [
        (method, multiplier, rates)
        for multiplier in MULTIPLIERS
        for method, of_method in configs.items()
        if (rates := _scaled_rates(of_method, multiplier))
    ]
    variants = {f"{name} x{factor:g}": dataclasses.replace(configs[name], **rates) for name, factor, rates in tried}
    results = run_variants(variants, [SEED], folder, console, overwrite=overwrite, keep_diverged=True)
    balanced = any(of.balances for of in configs.values())
    measure = "balanced accuracy" if balanced else "accuracy"
    searches: dict[str, list[Searched]] = {}
    for (method, multiplier, rates), result in zip(tried, results, strict=True):
        complete = result.metrics["status"] == "complete"  # else it diverged
        accuracy = _held_out_accuracy(result.metrics, balanced=balanced) if complete else -math.inf
        seconds = result.metrics["cost"]["seconds_total"]
        searches.setdefault(method, []).append(Searched(rates, multiplier, measure, accuracy, seconds))
    found = {method: _best(searched) for method, searched in searches.items()}
    for method, best in found.items():
        print_plain(console, f"{name_of_method(method)}: {best}")
    return found


def _scaled_rates(config: TuneConfig, multiplier: float) -> dict[str, Any]:
    """Return the learning rates of a method's recipe times a factor; none for a method without steps."""
    resolved = config.resolved()
    known = {name: rate for name in RATES if (rate := getattr(resolved, name)) is not None}
    return {name: rate * multiplier for name, rate in known.items()} if resolved.epochs else {}


def _held_out_accuracy(metrics: Mapping[str, Any], *, balanced: bool) -> float:
    if balanced:
        return metrics["by_class"][VALIDATION]["balanced_accuracy"]
    return metrics["validation"]["tuned"]


def _best(searched: list[Searched]) -> Searched:
    """Return the result with the best accuracy, of equal ones the first, with the seconds of all."""
    best = max(searched, key=lambda one: one.accuracy)
    return best._replace(seconds=sum(one.seconds for one in searched))
