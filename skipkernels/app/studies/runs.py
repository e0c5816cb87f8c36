"""Run several configurations with several seeds, one subprocess per run."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ...formatting import duration
from ..config import CONFIG, TuneConfig
from ..console import Terminal, plain, print_plain
from ..data import InputError
from ..data.files import file_name
from ..results.files import METRICS
from ..train import check, tune
from ..train.choice import chosen_before
from ..train.writing import RunFolder

RUNS = "runs"


class Result(NamedTuple):
    """Variant, seed, contents of metrics.json, and folder of a run, relative to that of the study."""

    variant: str
    seed: int
    metrics: dict[str, Any]
    folder: str


class Planned(NamedTuple):
    """A run to start, to resume, or that is complete."""

    variant: str
    config: TuneConfig  # resolved, with the folder of the run
    folder: str  # relative to that of the study
    metrics: dict[str, Any] | None  # of the complete run

    @property
    def title(self) -> str:
        """Variant and seed."""
        return f"{self.variant}, seed {self.config.seed}"


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
    again unless `overwrite`, and interrupted runs are resumed. Each variant is checked before the first run starts.

    With `keep_diverged`, a run with an infinite or NaN loss is a result, with the status "diverged" and its time.
    """
    planned = [
        _plan(name, variants[name], seed, folder, overwrite=overwrite)
        for seed, name in itertools.product(seeds, variants)
    ]
    waiting = [run for run in planned if run.metrics is None]
    if len(waiting) > 1:
        console.print(plain("checking the settings", "dim"))
        _in_subprocess(_check, {run.variant: run.config for run in waiting})  # one seed of each variant
    if len(waiting) < len(planned):
        print_plain(console, f"{len(planned) - len(waiting)} of {len(planned)} runs are complete in {folder}")
    results = []
    for number, run in enumerate(planned, 1):
        metrics = run.metrics
        if metrics is None:
            console.print(plain(f"{number} of {len(planned)}", "bold"), plain(f" {run.title}"), soft_wrap=True)
            started = time.perf_counter()
            try:
                metrics = _in_subprocess(_run, run.config)
            except FloatingPointError:
                if not keep_diverged:
                    raise
                metrics = {"status": "diverged", "cost": {"seconds_total": time.perf_counter() - started}}
            print_plain(console, f"{run.title}: {_outcome(metrics)}, {duration(time.perf_counter() - started)}")
        results.append(Result(run.variant, run.config.seed, metrics, run.folder))
    return results


def _plan(variant: str, config: TuneConfig, seed: int, folder: Path, *, overwrite: bool) -> Planned:
    """Plan the run of a variant; raise if its folder holds a complete run with other settings."""
    inner = f"{RUNS}/{file_name(variant)}-{seed}"
    out = folder / inner
    config = dataclasses.replace(config, seed=seed, out=out, overwrite=overwrite, resume=False)
    metrics = None
    with _variant_in_errors(variant):
        config = config.resolved()
        if (out / METRICS).exists() and not overwrite:
            metrics = RunFolder(dataclasses.replace(chosen_before(config)[0], resume=True)).finished
    config = dataclasses.replace(config, resume=not overwrite and (out / CONFIG).exists())
    return Planned(variant, config, inner, metrics)


def _outcome(metrics: Mapping[str, Any]) -> str:
    """Accuracies of a run, or its status if it is not complete."""
    if metrics["status"] != "complete":
        return metrics["status"]
    known = {name: value for name, value in (metrics["tuned"] or {}).items() if value is not None}
    if (metrics.get("validation") or {}).get("tuned") is not None:
        known["validation"] = metrics["validation"]["tuned"]
    return ", ".join(f"{name} {value:.1f} %" for name, value in known.items()) or "no accuracy"


# ---- in a subprocess -------------------------------------------------------------------------------------------------


def _in_subprocess(work: Callable[[Any], Any], argument: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(work, argument).result()


def _check(configs: Mapping[str, TuneConfig]) -> None:
    for name, config in configs.items():
        with _variant_in_errors(name):
            check(config)


def _run(config: TuneConfig) -> dict[str, Any]:
    return tune(config, Terminal(sys.stderr))


@contextlib.contextmanager
def _variant_in_errors(variant: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{error.reason} (run: {variant})", error.argument, error.function) from error
