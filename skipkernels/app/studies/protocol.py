"""Run the paper's protocols over several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..config import TuneConfig
from ..data import Protocol
from ..report.words import name_of_method, shots_text
from .comparison import compare_best
from .runs import Result, Variant, run_variants
from .study import ACCURACY, Column, Study

SHOTS = (1, 2, 4, 8, 16)  # training images per class in the few-shot protocol, as in CoOp


def run_protocol(
    config: TuneConfig,
    protocol: Protocol,
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    *,
    shots: Sequence[int] = SHOTS,
    overwrite: bool = False,
) -> Study:
    """Run a protocol with several seeds; `shots` are for "few-shot", other protocols use `config.shots`."""
    config = dataclasses.replace(config, protocol=protocol)
    if protocol == "few-shot":
        variants = [
            Variant(f"{count} shot{'s' if count > 1 else ''}", dataclasses.replace(config, shots=count))
            for count in shots
        ]
    else:
        variants = [Variant(shots_text(config.chosen_shots), config)]
    results = run_variants(variants, seeds, folder, console, overwrite=overwrite)
    title = f"{config.model} on {config.data} · {name_of_method(config.method)} · {protocol}"
    if protocol != "few-shot":
        return Study(protocol, title, results, _columns(results), "tests")
    more = {"comparison": compare_best(results, folder, next(iter(results[0].metrics["tuned"])))}
    return Study(protocol, title, results, _columns(results), "shots", more=more)


def _columns(results: Sequence[Result]) -> list[Column]:
    """Columns for each accuracy of the protocol, zero-shot and tuned; few-shot has a single accuracy."""
    keys, when = list(results[0].metrics["tuned"]), {"zero-shot": "zero_shot", "tuned": "tuned"}
    if results[0].metrics["protocol"] == "few-shot":
        return [Column(ACCURACY, name, (part, keys[0])) for name, part in when.items()]
    return [Column(name, key, (part, key)) for name, part in when.items() for key in keys]
