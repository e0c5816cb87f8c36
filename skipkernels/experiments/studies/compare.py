"""Compare methods, or values of a setting of Skip Tuning, by accuracy, time and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ...data import InputError
from ...options import Ablated
from ...tuner import TuneConfig
from ...tuner.methods import METHODS
from .runs import Blend, Result, Variant, run_variants
from .study import ACCURACY, COST, Column, Study, accuracy, cost

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
    blend: Blend | None = None,
) -> Study:
    """Run several methods with the same training images and tests.

    Args:
        config: Configuration of every run except the method. Settings that are None follow each method's recipe;
            settings that do not apply to a method are ignored for it.
        methods: Keys of `METHODS`.
        seeds: Seeds of the runs of each method.
        folder: Output folder.
        console: Console for progress.
        overwrite: Run completed runs again.
        blend: See `run_variants`.

    Raises:
        InputError: If a method is unknown or repeated, or a configuration is invalid.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods or len(set(methods)) < len(methods):
        got = f"no method {unknown[0]!r}" if unknown else f"got {' '.join(methods) or 'none'}"
        raise InputError(f"compare: methods must be distinct names of {', '.join(METHODS)}; {got}.", "methods")
    variants = [Variant(method, config.with_method(method)) for method in methods]
    results = run_variants(variants, seeds, folder, console, overwrite=overwrite, blend=blend)
    return Study("compare", f"{config.model} on {config.data}, {config.shots_text}", results, _columns(results))


def ablate(
    config: TuneConfig,
    setting: Ablated,
    values: Sequence[int | float],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    *,
    overwrite: bool = False,
    blend: Blend | None = None,
) -> Study:
    """Run Skip Tuning with several values of a setting.

    Args:
        config: Configuration of every run except the setting.
        setting: Field of `TuneConfig` to vary.
        values: Its values; if empty, those of `VALUES`.
        seeds: Seeds of the runs of each value.
        folder: Output folder.
        console: Console for progress.
        overwrite: Run completed runs again.
        blend: See `run_variants`.

    Raises:
        InputError: If a value is repeated, or a configuration is invalid.
    """
    values = values or VALUES[setting]
    if len(set(values)) < len(values):
        raise InputError(f"ablate: values must be different; got {' '.join(map(str, values))}.", "values")
    variants = []
    for value in values:
        change: dict[str, Any] = {setting: value}
        variants.append(Variant(f"{setting} {value:g}", dataclasses.replace(config, **change)))
    results = run_variants(variants, seeds, folder, console, overwrite=overwrite, blend=blend)
    title = f"{config.model} on {config.data}, {config.shots_text}"
    return Study(f"ablate-{setting}", title, results, _columns(results))


def _columns(results: Sequence[Result]) -> list[Column]:
    """Columns for the accuracies of the protocol, and for time and memory."""
    return [
        *(Column(ACCURACY, key, accuracy(key)) for key in results[0].metrics["tuned"]),
        Column(COST, "tuning, s", cost("seconds_tuning")),
        Column(COST, "step, ms", cost("milliseconds_per_step")),
        Column(COST, "classes a step", lambda metrics: metrics["kept_classes"]),
        Column(COST, "peak, MiB", cost("peak_memory_mib"), 0),
        Column(COST, "parameters", lambda metrics: metrics["parameters"]["trained"], 0),
    ]
