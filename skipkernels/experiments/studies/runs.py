"""Many runs of the tuner, one after the other, each in a process of its own, and what they say together."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ...console import plain, stderr
from ...data import InputError
from ...tuner import TuneConfig, check, tune
from ...tuner.run_folder import CONFIG, METRICS, read_metrics

RUNS = "runs"


@dataclass(frozen=True)
class Variant:
    """Settings that are compared with others.

    Attributes:
        name: As tables have it, and the folder of its runs.
        config: All but the seed and the folder.
    """

    name: str
    config: TuneConfig


class Result(NamedTuple):
    """A run: of which variant, with which seed, and what its metrics.json holds."""

    variant: str
    seed: int
    metrics: dict[str, Any]


class Spread(NamedTuple):
    """Mean and standard deviation (of a sample) of some runs; of a single one there is no deviation."""

    mean: float
    deviation: float | None

    def text(self, digits: int = 1) -> str:
        """For a table.

        >>> Spread(75.25, 1.0).text(), Spread(75.25, None).text()
        ('75.2 ± 1.0', '75.2')
        """
        deviation = f" ± {self.deviation:.{digits}f}" if self.deviation else ""
        return f"{self.mean:.{digits}f}{deviation}"


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of values that are all there; None if one is not.

    >>> spread([1.0, 3.0])
    Spread(mean=2.0, deviation=1.4142135623730951)
    >>> spread([1.0, None]) is None
    True
    """
    known = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None) if known else None


def execute(
    variants: Sequence[Variant], seeds: Sequence[int], folder: Path, console: Console, *, overwrite: bool = False
) -> list[Result]:
    """Run every variant with every seed; variants in turn, so that a slow hour of the machine hits them alike.

    A process of its own makes times and peaks of memory comparable. A run that is complete in the folder is not run
    again, one that was cut off goes on; so the same command after Ctrl-C goes on, too. All variants are checked before
    the first one runs.

    Args:
        variants: With different names.
        seeds: Of training images, order and draws.
        folder: A run is in `folder/runs/VARIANT-SEED`.
        console: Where progress is shown.
        overwrite: Run all again.

    Raises:
        InputError: If a run's settings can't be used, or its folder holds one with others.
    """
    planned = [_Planned.of(variant, seed, folder, overwrite) for seed in seeds for variant in variants]
    first_of = {run.variant: run for run in reversed(planned) if run.metrics is None}
    _check(sorted(first_of.values(), key=planned.index)[1:], console)  # the first one checks itself as it begins
    results = []
    for number, run in enumerate(planned, 1):
        metrics = run.metrics
        if metrics is None:
            console.print(plain(f"{number} of {len(planned)}", "bold"), plain(f" {run.variant}, seed {run.seed}"))
            metrics = _apart(_run, run.config)
        results.append(Result(run.variant, run.seed, metrics))
    return results


class _Planned(NamedTuple):
    """A run, and its metrics if it is complete."""

    variant: str
    seed: int
    config: TuneConfig
    metrics: dict[str, Any] | None

    @classmethod
    def of(cls, variant: Variant, seed: int, folder: Path, overwrite: bool) -> _Planned:
        out = folder / RUNS / f"{variant.name.replace(' ', '-').replace('/', '-')}-{seed}"
        config = dataclasses.replace(variant.config, seed=seed, out=out, overwrite=overwrite, resume=False)
        with _named(variant.name):
            config = config.resolved()
            metrics = None if overwrite else _complete(config)
        resume = not overwrite and (out / CONFIG).exists()
        return cls(variant.name, seed, dataclasses.replace(config, resume=resume), metrics)


@contextlib.contextmanager
def _named(variant: str) -> Iterator[None]:
    """An error says of which variant it is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{variant}: {error}", error.argument) from error


def _check(runs: Sequence[_Planned], console: Console) -> None:
    if runs:
        console.print(plain(f"looking at the settings of {', '.join(run.variant for run in runs)}", "dim"))
    for run in runs:
        with _named(run.variant):
            _apart(_check_config, run.config)


def _complete(config: TuneConfig) -> dict[str, Any] | None:
    """Metrics of a run that is complete in its folder with these settings."""
    assert config.out is not None
    if not (config.out / METRICS).exists():
        return None
    kept = TuneConfig.from_yaml(config.out / CONFIG)
    differing = config.differs_from(kept)
    if differing:
        raise InputError(
            f"--out: {config.out} holds a run with another {' and '.join(differing)}; choose another folder, or add "
            "--overwrite."
        )
    metrics = read_metrics(config.out)
    return metrics if metrics["status"] == "complete" else None


def _apart(work: Callable[[TuneConfig], Any], config: TuneConfig) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(work, config).result()


# Functions of this module, so that unpickling them in the subprocess imports the experiments, which register methods.
def _check_config(config: TuneConfig) -> None:
    check(config)


def _run(config: TuneConfig) -> dict[str, Any]:
    return tune(config, stderr())


def by_variant(results: Sequence[Result], value: Callable[[dict[str, Any]], float | None]) -> dict[str, Spread | None]:
    """Of each variant, in order: mean and deviation of a value over its seeds."""
    names = dict.fromkeys(result.variant for result in results)
    return {name: spread(value(r.metrics) for r in results if r.variant == name) for name in names}
