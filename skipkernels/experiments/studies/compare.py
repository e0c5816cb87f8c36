"""Skip Tuning against other methods, and against itself with other settings: accuracy, time, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from ...data import InputError
from ...tuner import TuneConfig
from ...tuner.methods import METHODS
from .runs import Result, Variant, execute
from .study import ACCURACY, COST, Column, Study, accuracy, cost

Ablated = Literal["skip_layers", "keep_ratio", "decay"]

# What is tried of a setting if nothing is said; the rest is as usual.
VALUES: dict[Ablated, tuple[int | float, ...]] = {
    "skip_layers": (0, 0.25, 0.5, 0.75, 1.0),
    "keep_ratio": (0.05, 0.1, 0.25, 0.5, 1.0),
    "decay": (0.05, 0.1, 0.3, 0.6, 1.0),
}


def compare(
    config: TuneConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    *,
    overwrite: bool = False,
) -> Study:
    """Run methods on the same images, tests and machine.

    Args:
        config: Of every run but for the method; what it leaves open is the method's own recipe.
        methods: Keys of `METHODS`. Settings that one of them has no use for are those of the others.
        seeds: Of the runs.
        folder: Where they are written.
        console: Where progress is shown.
        overwrite: Run again what is there.

    Raises:
        InputError: If there is no such method, or something else can't be used.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) < len(methods):
        got = f"no method {unknown[0]!r}" if unknown else f"got {' '.join(methods) or 'none'}"
        raise InputError(f"--methods: {got}; name each once, of {', '.join(METHODS)}.")
    variants = [Variant(method, config.with_method(method)) for method in methods]
    results = execute(variants, seeds, folder, console, overwrite=overwrite)
    return Study("compare", f"{config.model} on {config.data}, {config.shots} shots", results, _columns(results))


def ablate(
    config: TuneConfig,
    setting: Ablated,
    values: Sequence[int | float],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    *,
    overwrite: bool = False,
) -> Study:
    """Run Skip Tuning with several values of a setting; arguments as of `compare`.

    Raises:
        InputError: If something can't be used.
    """
    tried = values or VALUES[setting]
    if len(set(tried)) < len(tried):
        raise InputError(f"--values: name each once; got {' '.join(map(str, tried))}.")
    changes: list[dict[str, Any]] = [{setting: value} for value in tried]
    variants = [
        Variant(f"{setting} {value:g}", dataclasses.replace(config, **change))
        for value, change in zip(tried, changes, strict=True)
    ]
    results = execute(variants, seeds, folder, console, overwrite=overwrite)
    return Study(
        f"ablate-{setting}", f"{config.model} on {config.data}, {config.shots} shots", results, _columns(results)
    )


def _columns(results: Sequence[Result]) -> list[Column]:
    """Accuracies as the protocol has them, and what they cost."""
    return [
        *(Column(ACCURACY, key, accuracy(key)) for key in results[0].metrics["tuned"]),
        Column(COST, "tuning, s", cost("seconds_tuning")),
        Column(COST, "step, ms", cost("milliseconds_per_step")),
        Column(COST, "classes a step", lambda metrics: metrics["kept_classes"]),
        Column(COST, "peak, MiB", cost("peak_memory_mib"), 0),
        Column(COST, "parameters", lambda metrics: metrics["parameters"]["trained"], 0),
    ]
