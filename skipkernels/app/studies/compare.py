"""Compare methods by accuracy, time and memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...folders import replace_text
from ..config import TuneConfig
from ..data import InputError
from ..methods import METHODS
from ..methods.registry import AUTO
from ..report.study_page import primary, study_html
from ..report.words import title_of
from ..results.files import REPORT, writing
from ..results.study import ACCURACY, COST, STUDY, MeanAndDeviation, Study
from ..train.metrics import environment
from .rates import Searched, search_rates
from .runs import Result, run_variants
from .significance import compare_best

Columns = Mapping[str, Mapping[str, tuple[str, ...]]]
"""Keys of a value in the metrics of a run, by the title of a table and the name of a column."""
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
    method are searched by the same rule, with another seed; see `search_rates`. Settings of `config` that are None
    follow each method's recipe; others are ignored for methods that they do not apply to. `command` repeats all.
    """
    _check_methods(methods)
    configs = {method: config.with_method(method) for method in methods}
    searchable = {method: of for method, of in configs.items() if method != AUTO}  # auto tries several rates itself
    searched: dict[str, Searched] = {}
    if config.own_data and searchable:
        searched = search_rates(searchable, folder / "search", console, overwrite=overwrite)
    configs |= {method: dataclasses.replace(configs[method], **best.rates) for method, best in searched.items()}
    results = run_variants(configs, seeds, folder, console, overwrite=overwrite)
    if searched:
        for result in results:
            best = searched.get(result.variant)
            result.metrics["search"] = None if best is None else best._asdict()
    tests = results[0].metrics["tuned"]
    comparison = compare_best(results, folder, primary(tests))
    return study_of(title_of(config.resolved()), command, results, _columns(tests, searched), comparison)


def _check_methods(methods: Sequence[str]) -> None:
    known = [*METHODS, AUTO]
    unknown = [method for method in methods if method not in known]
    if unknown or not methods or len(set(methods)) < len(methods):
        got = f"no method {unknown[0]!r}" if unknown else f"got {' '.join(methods) or 'none'}"
        raise InputError(f"must be distinct names of {', '.join(known)}; {got}.", "methods", "compare")


def _columns(tests: Iterable[str], searched: Mapping[str, Searched]) -> Columns:
    """Columns of accuracies and costs, and of the search of the rates if there was one."""
    columns: dict[str, Mapping[str, tuple[str, ...]]] = {ACCURACY: {test: ("tuned", test) for test in tests}}
    columns[COST] = _COSTS
    if searched:
        measure = next(iter(searched.values())).measure
        names = {"multiplier": "multiplier", measure: "accuracy", "seconds": "seconds"}
        columns["search of the rates"] = {name: ("search", field) for name, field in names.items()}
    return columns


def study_of(
    title: str, command: str, results: Sequence[Result], columns: Columns, comparison: dict[str, Any] | None
) -> Study:
    """Return the contents of compare.json; `comparison` is that of the best method with the others."""

    def summary(variant: str, keys: tuple[str, ...]) -> MeanAndDeviation | None:
        return MeanAndDeviation.of(_value(result.metrics, keys) for result in results if result.variant == variant)

    summaries = {
        variant: {
            table: {name: summary(variant, keys) for name, keys in of_table.items()}
            for table, of_table in columns.items()
        }
        for variant in dict.fromkeys(result.variant for result in results)
    }
    return Study(
        title=title,
        command=command,
        seeds=sorted({result.seed for result in results}),
        **environment("cpu"),
        threads=torch.get_num_threads(),
        summary=summaries,
        comparison=comparison,
        runs=[result._asdict() for result in results],
    )


def _value(metrics: Any, keys: tuple[str, ...]) -> float | None:
    """Value of the metrics of a run; None if one on the way to it is None."""
    for key in keys:
        metrics = None if metrics is None else metrics[key]
    return metrics


def write_study(study: Study, folder: Path) -> list[Path]:
    """Write compare.json and report.html, and return their paths."""
    texts = {folder / STUDY: json.dumps(dataclasses.asdict(study), indent=2) + "\n", folder / REPORT: study_html(study)}
    with writing(folder, "out", "compare"):
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            replace_text(path, text)
    return list(texts)
