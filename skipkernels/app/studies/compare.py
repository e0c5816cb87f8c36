"""Compare methods by accuracy, time and memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..config import RATES, TuneConfig
from ..console import plain, print_plain
from ..data import InputError
from ..methods import METHODS
from ..methods.registry import AUTO
from ..report.study_page import ACCURACY, COST, Study, primary
from ..report.summary import held_out_accuracy
from ..report.words import name_of_method, title_of
from ..train.setup import build_task
from .comparison import compare_best
from .runs import run_variants
from .study import study_of

MULTIPLIERS = (1.0, 0.3, 3.0, 0.1, 10.0)
"""Factors of the learning rates of each method that are searched on the user's data; of equal ones the first is chosen.
"""
SEARCH_SEED = 10
_COSTS = {
    "tuning, s": ("cost", "seconds_tuning"),
    "step, ms": ("cost", "milliseconds_per_step"),
    "classes a step": ("kept_classes",),
    "peak, MiB": ("cost", "peak_memory_mib"),
    "parameters": ("parameters", "trained"),
}


def compare(
    config: TuneConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    *,
    overwrite: bool = False,
    command: str = "",
) -> Study:
    """Run several methods, keys of `METHODS` or "auto", with the same training images and tests; return the study.

    Recipes are chosen for published benchmarks and for pictograms. On the user's own data the learning rates of every
    method are searched by the same rule: all of `MULTIPLIERS`, with another seed; the best accuracy on the validation
    images is kept. There is no search without validation images, or if a rate is given. Settings of `config` that are
    None follow each method's recipe; others are ignored for methods that they do not apply to. `command` repeats all.
    """
    known = [*METHODS, AUTO]
    unknown = [method for method in methods if method not in known]
    if unknown or not methods or len(set(methods)) < len(methods):
        got = f"no method {unknown[0]!r}" if unknown else f"got {' '.join(methods) or 'none'}"
        raise InputError(f"must be distinct names of {', '.join(known)}; {got}.", "methods", "compare")
    configs = {method: config.with_method(method) for method in methods}
    fixed = {method: of for method, of in configs.items() if method != AUTO}  # which tries several rates itself
    searched = _search(fixed, folder / "search", console, overwrite) if config.own_data and fixed else {}
    configs |= {method: dataclasses.replace(configs[method], **found.rates) for method, found in searched.items()}
    results = run_variants(configs, seeds, folder, console, overwrite=overwrite)
    accuracies = {test: ("tuned", test) for test in results[0].metrics["tuned"]}
    columns: dict[str, Mapping[str, tuple[str, ...]]] = {ACCURACY: accuracies, COST: _COSTS}
    if searched:
        for result in results:
            found = searched.get(result.variant)
            result.metrics["search"] = None if found is None else found._asdict()
        measure = next(iter(searched.values())).measure
        names = {"multiplier": "multiplier", measure: "accuracy", "seconds": "seconds"}
        columns["search of the rates"] = {name: ("search", field) for name, field in names.items()}
    comparison = compare_best(results, folder, primary(accuracies))
    return study_of(title_of(config.resolved()), command, results, columns, comparison)


class Searched(NamedTuple):
    """Result of a search of the learning rates of a method."""

    rates: dict[str, Any]
    multiplier: float  # factor of the rates of the recipe
    measure: str  # "accuracy", or "balanced accuracy"
    accuracy: float  # in per cent, on the validation images
    seconds: float  # of all runs


def _scaled_rates(config: TuneConfig, multiplier: float) -> dict[str, Any]:
    """Return the learning rates of a method's recipe times a factor; none for a method without steps."""
    resolved = config.resolved()
    known = {name: rate for name in RATES if (rate := getattr(resolved, name)) is not None}
    return {name: rate * multiplier for name, rate in known.items()} if resolved.epochs else {}


def _search(configs: dict[str, TuneConfig], folder: Path, console: Console, overwrite: bool) -> dict[str, Searched]:
    """Search the learning rates of each method that has some; see `compare`."""
    config, balanced = next(iter(configs.values())), any(of.balances for of in configs.values())
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
    results = run_variants(variants, [SEARCH_SEED], folder, console, overwrite=overwrite, keep_diverged=True)
    measure = "balanced accuracy" if balanced else "accuracy"
    searches: dict[str, list[Searched]] = {}
    for (method, multiplier, rates), result in zip(tried, results, strict=True):
        complete = result.metrics["status"] == "complete"  # else it diverged
        accuracy = held_out_accuracy(result.metrics, balanced=balanced)[1] if complete else -math.inf
        seconds = result.metrics["cost"]["seconds_total"]
        searches.setdefault(method, []).append(Searched(rates, multiplier, measure, accuracy, seconds))
    found: dict[str, Searched] = {}
    for method, searched in searches.items():
        best = max(searched, key=lambda one: one.accuracy)  # of equal ones the first
        best = found[method] = best._replace(seconds=sum(one.seconds for one in searched))
        chosen = ", ".join(f"{name} {rate:g}" for name, rate in best.rates.items())
        chosen += f" (×{best.multiplier:g}), {best.measure} {best.accuracy:.1f} % on validation images"
        took = f"its runs took {best.seconds:.0f} s, without the starts of their processes"
        print_plain(console, f"{name_of_method(method)}: {chosen}; {took}")
    return found
