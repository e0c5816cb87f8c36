"""The paper's protocols over several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ...data import Protocol
from ...tuner import TuneConfig
from .runs import Result, Variant, execute
from .study import ACCURACY, Column, Study, accuracy

SHOTS = (1, 2, 4, 8, 16)  # of few-shot, as CoOp


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
    """Run a protocol.

    Args:
        config: Of every run.
        protocol: Which.
        seeds: Of the runs.
        folder: Where they are written.
        console: Where progress is shown.
        shots: Training images of each class, for few-shot; others take those of `config`.
        overwrite: Run again what is there.

    Raises:
        InputError: If something can't be used.
    """
    config = dataclasses.replace(config, protocol=protocol)
    if protocol == "few-shot":
        variants = [
            Variant(f"{count} shot{'s' if count > 1 else ''}", dataclasses.replace(config, shots=count))
            for count in shots
        ]
    else:
        variants = [Variant(f"{config.shots} shots", config)]
    results = execute(variants, seeds, folder, console, overwrite=overwrite)
    title = f"{protocol}: {config.model} on {config.data}, {config.method}"
    return Study(protocol, title, results, _columns(results), "shots" if protocol == "few-shot" else "tests")


def _columns(results: Sequence[Result]) -> list[Column]:
    """Each figure of the protocol, before and after; few-shot has one, over several numbers of shots."""
    keys, when = list(results[0].metrics["tuned"]), {"zero-shot": "zero_shot", "tuned": "tuned"}
    if results[0].metrics["protocol"] == "few-shot":
        return [Column(ACCURACY, name, accuracy(keys[0], part)) for name, part in when.items()]
    return [Column(name, key, accuracy(key, part)) for name, part in when.items() for key in keys]
