"""Run several configurations with several seeds, one subprocess per run, and average over seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ...formatting import duration
from ..config import TuneConfig
from ..console import Terminal, plain, print_plain
from ..data import InputError
from ..train import check, tune
from ..train.choice import chosen_before
from ..train.run_folder import CONFIG, METRICS, read_metrics

RUNS = "runs"


@dataclass(frozen=True)
class Variant:
    """A configuration to run."""

    name: str  # Name in tables and in the folders of its runs
    config: TuneConfig  # Configuration; its seed and output folder are replaced


class Result(NamedTuple):
    """Variant, seed, contents of metrics.json, and folder of a run, relative to that of the study."""

    variant: str
    seed: int
    metrics: dict[str, Any]
    folder: str


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


class Planned(NamedTuple):
    """A run to start, to resume, or that is complete."""

    name: str  # of its variant
    config: TuneConfig  # resolved, with the folder of the run
    metrics: dict[str, Any] | None  # of the complete run

    @property
    def title(self) -> str:
        """Variant and seed."""
        return f"{self.name}, seed {self.config.seed}"


def plan(variant: Variant, seed: int, folder: Path, *, overwrite: bool = False) -> Planned:
    """Plan the run of a variant in `folder/runs/VARIANT-SEED`; raise if it holds a run with other settings."""
    out = folder / RUNS / f"{variant.name.replace(' ', '-').replace('/', '-')}-{seed}"
    config = dataclasses.replace(variant.config, seed=seed, out=out, overwrite=overwrite, resume=False)
    with _variant_in_errors(variant.name):
        config = config.resolved()
        metrics = None if overwrite else _complete(config)
    return Planned(variant.name, dataclasses.replace(config, resume=not overwrite and (out / CONFIG).exists()), metrics)


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
    planned = [plan(variant, seed, folder, overwrite=overwrite) for seed, variant in itertools.product(seeds, variants)]
    # One seed of each variant; the first run checks itself.
    unchecked = {run.name: run.config for run in planned[1:] if run.metrics is None}
    if unchecked:
        console.print(plain("checking the settings", "dim"))
        _in_subprocess(_check, unchecked)
    waiting = [run for run in planned if run.metrics is None]
    if len(waiting) < len(planned):
        print_plain(console, f"{len(planned) - len(waiting)} of {len(planned)} runs are complete in {folder}")
    results, noted = [], set[str]()
    seconds: dict[str, list[float]] = {}  # of the runs of each variant
    for number, run in enumerate(planned, 1):
        metrics = run.metrics
        if metrics is None:
            left = _expected(seconds, [other.name for other in planned[number - 1 :] if other.metrics is None])
            about = "" if left is None else f", about {duration(left)} left"
            console.print(plain(f"{number} of {len(planned)}", "bold"), plain(f" {run.title}{about}"), soft_wrap=True)
            started = time.perf_counter()
            metrics = _execute(run, keep_diverged=keep_diverged, notes=run.config.method not in noted)
            noted.add(run.config.method)
            took = time.perf_counter() - started
            print_plain(console, f"{run.title}: {_outcome(metrics)}, {duration(took)}")
        else:
            took = metrics["cost"]["seconds_total"]
        seconds.setdefault(run.name, []).append(took)
        assert run.config.out is not None
        results.append(Result(run.name, run.config.seed, metrics, run.config.out.relative_to(folder).as_posix()))
    return results


def _expected(seconds: Mapping[str, Sequence[float]], names: Sequence[str]) -> float | None:
    """Seconds that runs of these variants take: the mean of those of the variant, or else of all; None before any."""
    known = [each for of_variant in seconds.values() for each in of_variant]
    if not known:
        return None
    return sum(statistics.fmean(seconds.get(name, known)) for name in names)


def _outcome(metrics: Mapping[str, Any]) -> str:
    """Accuracies of a run, or its status if it is not complete."""
    if metrics["status"] != "complete":
        return metrics["status"]
    known = {name: value for name, value in (metrics["tuned"] or {}).items() if value is not None}
    if (metrics.get("validation") or {}).get("tuned") is not None:
        known["validation"] = metrics["validation"]["tuned"]
    return ", ".join(f"{name} {value:.1f} %" for name, value in known.items()) or "no accuracy"


def _execute(run: Planned, *, keep_diverged: bool, notes: bool) -> dict[str, Any]:
    """Run in a subprocess, and return the metrics; of a diverged run that is kept, its status and time."""
    started = time.perf_counter()
    try:
        return _in_subprocess(partial(_run, notes=notes), run.config)
    except FloatingPointError:
        if not keep_diverged:
            raise
        return {"status": "diverged", "cost": {"seconds_total": time.perf_counter() - started}}


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
    differing = chosen_before(config).differs_from(TuneConfig.from_yaml(config.out / CONFIG, trust=True))
    if differing:
        raise InputError(
            f"run_variants: {config.out} holds a run with another {' and '.join(differing)}. Choose another folder, or "
            "add `overwrite=True`.",
            "out",
        )
    metrics = read_metrics(config.out)
    return metrics if metrics["status"] == "complete" else None


def _in_subprocess(work: Callable[[Any], Any], argument: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as process:
        return process.submit(work, argument).result()


def _end_with_parent() -> None:
    """End this process when the one that started it ends, also by a kill, which no code of it survives."""

    def wait(parent: Any) -> None:
        parent.join()
        os._exit(1)

    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=wait, args=(parent,), daemon=True).start()


def _check(configs: dict[str, TuneConfig]) -> None:
    for name, config in configs.items():
        with _variant_in_errors(name):
            check(config)


def _run(config: TuneConfig, *, notes: bool) -> dict[str, Any]:
    return tune(config, Terminal(sys.stderr) if notes else _WithoutNotes(sys.stderr))


class _WithoutNotes(Terminal):
    """Terminal that leaves out notes, for runs that have those of an earlier one."""

    def print(self, *objects: Any, **options: Any) -> None:
        if not str(objects[0] if objects else "").startswith("note: "):
            super().print(*objects, **options)
