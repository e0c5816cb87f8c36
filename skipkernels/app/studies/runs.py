"""Run several configurations with several seeds, one subprocess per run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ...formatting import duration
from ..config import CONFIG, TuneConfig
from ..console import Terminal, plain, print_plain
from ..data import InputError
from ..data.files import file_name
from ..results.files import METRICS, read_metrics
from ..train import tune
from ..train.candidates import Choice
from ..train.reading import check_settings

RUNS = "runs"


class Result(NamedTuple):
    """Variant, seed, contents of metrics.json, and folder of a run, relative to that of the study."""

    variant: str
    seed: int
    metrics: dict[str, Any]
    folder: str


def run_variants(
    variants: Mapping[str, TuneConfig],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    *,
    overwrite: bool = False,
    keep_diverged: bool = False,
) -> list[Result]:
    """Run every variant, a configuration by its name, with every seed, in `folder/runs/VARIANT-SEED`.

    All variants run with one seed before the next seed, so that temporary load on the machine affects all of them. Each
    run has its own subprocess, so that times and peak memory are comparable. Completed runs in the folder are not run
    again unless `overwrite`, and interrupted runs are resumed.

    With `keep_diverged`, a run with an infinite or NaN loss is a result, with the status "diverged" and its time.
    """
    planned = [
        (name, *_plan(name, variants[name], seed, folder, overwrite=overwrite))
        for seed, name in itertools.product(seeds, variants)
    ]
    if complete := sum(metrics is not None for _, _, metrics in planned):
        print_plain(console, f"{complete} of {len(planned)} runs are complete in {folder}")
    results = []
    for number, (variant, config, metrics) in enumerate(planned, 1):
        if metrics is None:
            title, started = f"{variant}, seed {config.seed}", time.perf_counter()
            console.print(plain(f"{number} of {len(planned)}", "bold"), plain(f" {title}"), soft_wrap=True)
            with _variant_in_errors(variant):
                metrics = _executed(config, keep_diverged)
            print_plain(console, f"{title}: {_outcome(metrics)}, {duration(time.perf_counter() - started)}")
        results.append(Result(variant, config.seed, metrics, _folder(variant, config.seed)))
    return results


def _folder(variant: str, seed: int) -> str:
    return f"{RUNS}/{file_name(variant)}-{seed}"


def _plan(
    variant: str, config: TuneConfig, seed: int, folder: Path, *, overwrite: bool
) -> tuple[TuneConfig, dict[str, Any] | None]:
    """Return the configuration of a run, and the metrics if it is complete; raise if it has other settings."""
    out = folder / _folder(variant, seed)
    config = dataclasses.replace(config, seed=seed, out=out, overwrite=overwrite)
    with _variant_in_errors(variant):
        config = config.resolved()
        if overwrite or not (out / CONFIG).exists():
            return config, None
        choice = Choice.read(out)
        asked = TuneConfig.from_yaml(out / CONFIG, trust=True).identity() if choice is None else choice.asked
        check_settings(out, config, asked)
        chosen = {} if choice is None else choice.settings
        metrics = read_metrics(out) if (out / METRICS).exists() else None
        return dataclasses.replace(config, **chosen, resume=out), metrics


def _outcome(metrics: Mapping[str, Any]) -> str:
    """Accuracies of a run, or its status if it is not complete."""
    if metrics["status"] != "complete":
        return metrics["status"]
    known = {name: value for name, value in (metrics["tuned"] or {}).items() if value is not None}
    if (metrics.get("validation") or {}).get("tuned") is not None:
        known["validation"] = metrics["validation"]["tuned"]
    return ", ".join(f"{name} {value:.1f} %" for name, value in known.items()) or "no accuracy"


# ---- in a subprocess -------------------------------------------------------------------------------------------------


def _executed(config: TuneConfig, keep_diverged: bool) -> dict[str, Any]:
    """Return the metrics of a run in a subprocess."""
    started = time.perf_counter()
    try:
        return _in_subprocess(config)
    except FloatingPointError:
        if not keep_diverged:
            raise
        return {"status": "diverged", "cost": {"seconds_total": time.perf_counter() - started}}


def _in_subprocess(config: TuneConfig) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_run, config).result()


def _run(config: TuneConfig) -> dict[str, Any]:
    return tune(config, Terminal(sys.stderr))


@contextlib.contextmanager
def _variant_in_errors(variant: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{error.reason} (run: {variant})", error.argument, error.function) from error
