"""Run several configurations with several seeds, one subprocess per run, and average over seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ..config import TuneConfig
from ..console import Terminal, plain
from ..data import InputError
from ..train import check, tune
from ..train.run_folder import CONFIG, METRICS, read_metrics

RUNS = "runs"


@dataclass(frozen=True)
class Variant:
    """A configuration to run."""

    name: str  # Name in tables and in the folders of its runs
    config: TuneConfig  # Configuration; its seed and output folder are replaced


class Result(NamedTuple):
    """Variant, seed and contents of metrics.json of a run."""

    variant: str
    seed: int
    metrics: dict[str, Any]


class MeanAndDeviation(NamedTuple):
    """Mean and sample standard deviation over runs; the deviation of a single run is None."""

    mean: float
    deviation: float | None


def mean_and_deviation(values: Iterable[float | None]) -> MeanAndDeviation | None:
    """Return mean and deviation, or None if there are no values or one of them is None.

    >>> mean_and_deviation([1.0, 3.0])
    MeanAndDeviation(mean=2.0, deviation=1.4142135623730951)
    >>> mean_and_deviation([1.0, None]) is None
    True
    """
    values = list(values)
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return MeanAndDeviation(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def run_variants(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    *,
    overwrite: bool = False,
    keep_diverged: bool = False,
) -> list[Result]:
    """Run every variant with every seed, in `folder/runs/VARIANT-SEED`; variants have distinct names.

    All variants run with one seed before the next seed, so that temporary load on the machine affects all of them. Each
    run has its own subprocess, so that times and peak memory are comparable. Completed runs in the folder are not run
    again unless `overwrite`, and interrupted runs are resumed. Each variant is checked before the first run starts.

    With `keep_diverged`, a run with an infinite or NaN loss is a result, with the status "diverged" and its time.
    """
    planned: list[tuple[str, TuneConfig, dict[str, Any] | None]] = []
    for seed, variant in itertools.product(seeds, variants):
        out = folder / RUNS / f"{variant.name.replace(' ', '-').replace('/', '-')}-{seed}"
        config = dataclasses.replace(variant.config, seed=seed, out=out, overwrite=overwrite, resume=False)
        with _variant_in_errors(variant.name):
            config = config.resolved()
            metrics = None if overwrite else _complete(config)
        resume = not overwrite and (out / CONFIG).exists()
        planned.append((variant.name, dataclasses.replace(config, resume=resume), metrics))
    # One seed of each variant; the first run checks itself.
    unchecked = {name: config for name, config, metrics in planned[1:] if metrics is None}
    if unchecked:
        console.print(plain("checking the settings", "dim"))
        _in_subprocess(_check, unchecked)
    results = []
    for number, (name, config, metrics) in enumerate(planned, 1):
        if metrics is None:
            console.print(plain(f"{number} of {len(planned)}", "bold"), plain(f" {name}, seed {config.seed}"))
            started = time.perf_counter()
            try:
                metrics = _in_subprocess(_run, config)
            except FloatingPointError:
                if not keep_diverged:
                    raise
                metrics = {"status": "diverged", "cost": {"seconds_total": time.perf_counter() - started}}
        results.append(Result(name, config.seed, metrics))
    return results


@contextlib.contextmanager
def _variant_in_errors(variant: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{variant}: {error}", error.argument) from error


def _complete(config: TuneConfig) -> dict[str, Any] | None:
    """Metrics of the run in the folder if it is complete, else None; raise if its settings differ."""
    assert config.out is not None
    if not (config.out / METRICS).exists():
        return None
    # trust: sources are compared, not opened
    differing = config.differs_from(TuneConfig.from_yaml(config.out / CONFIG, trust=True))
    if differing:
        raise InputError(
            f"run_variants: {config.out} holds a run with another {' and '.join(differing)}. Choose another folder, or "
            "add `overwrite=True`.",
            "out",
        )
    metrics = read_metrics(config.out)
    return metrics if metrics["status"] == "complete" else None


def _in_subprocess(work: Callable[[Any], Any], argument: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, argument).result()


def _check(configs: dict[str, TuneConfig]) -> None:
    for name, config in configs.items():
        with _variant_in_errors(name):
            check(config)


def _run(config: TuneConfig) -> dict[str, Any]:
    return tune(config, Terminal(sys.stderr))
