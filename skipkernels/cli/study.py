"""`skipkernels protocol` and `skipkernels compare`: many runs, one table, one picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from skipkernels.console import Terminal
from skipkernels.data import InputError, Protocol
from skipkernels.experiments.studies.compare import ablate, compare
from skipkernels.experiments.studies.defaults import SHOTS, Ablated
from skipkernels.experiments.studies.plots import study_svg
from skipkernels.experiments.studies.protocol import run_protocol
from skipkernels.experiments.studies.study import Study
from skipkernels.tuner import TuneConfig
from skipkernels.tuner.registry import METHODS


@dataclasses.dataclass(frozen=True)
class ProtocolRuns(TuneConfig):
    """Settings of every run of a protocol: not what the study sets itself."""

    protocol: tyro.conf.Suppress[Protocol | None] = TuneConfig.protocol
    seed: tyro.conf.Suppress[int] = TuneConfig.seed
    resume: tyro.conf.Suppress[bool] = False


@dataclasses.dataclass(frozen=True)
class ComparedRuns(TuneConfig):
    """Settings of every run of a comparison: not what the study sets itself."""

    method: tyro.conf.Suppress[str] = TuneConfig.method
    seed: tyro.conf.Suppress[int] = TuneConfig.seed
    resume: tyro.conf.Suppress[bool] = False


@dataclasses.dataclass(frozen=True)
class ProtocolConfig:
    """Run a protocol of the paper over several seeds: a table, a JSON and a picture. All options of tune hold.

    The same command after Ctrl-C goes on; runs that are complete are not run again.
    """

    name: tyro.conf.Positional[Protocol | Literal["all"]]
    """base-to-new, cross-dataset, domain-generalization, few-shot, or all four."""
    run: Annotated[ProtocolRuns, tyro.conf.arg(name="")]
    """Settings of every run."""
    seeds: int = 3
    """How many: 0, 1, …"""
    numbers_of_shots: tuple[int, ...] = SHOTS
    """Training images of each class, for few-shot."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare methods, or settings of Skip Tuning, on one machine in one run. All options of tune hold.

    What isn't given is each method's own recipe. The same command after Ctrl-C goes on.
    """

    run: Annotated[ComparedRuns, tyro.conf.arg(name="")]
    """Settings of every run."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which."""
    seeds: int = 3
    """How many: 0, 1, …"""
    ablate: Ablated | None = None
    """Skip Tuning with several values of a setting, in place of methods."""
    values: tuple[int | float, ...] = ()
    """Of that setting."""


def run_protocols(command: ProtocolConfig, out: Terminal, err: Terminal) -> None:
    """Run `skipkernels protocol`.

    Raises:
        InputError: For what can't be used.
    """
    base, seeds = _checked(command.run, command.seeds)
    if command.name == "few-shot" and command.run.shots != TuneConfig.shots:
        raise InputError(f"--shots {command.run.shots} has no effect with few-shot; give --numbers-of-shots.")
    if command.name not in ("few-shot", "all") and command.numbers_of_shots != SHOTS:
        raise InputError(f"--numbers-of-shots has no effect with {command.name}; give --shots.")
    names: tuple[Protocol, ...] = get_args(Protocol) if command.name == "all" else (command.name,)
    for name in names:
        folder = command.run.out or Path("runs", "protocols", _slug(base))
        study = run_protocol(
            base,
            name,
            seeds,
            folder / name,
            err,
            shots=command.numbers_of_shots,
            overwrite=command.run.overwrite,
        )
        _show(study, folder / name, out)


def run_comparison(command: CompareConfig, out: Terminal, err: Terminal) -> None:
    """Run `skipkernels compare`.

    Raises:
        InputError: For what can't be used.
    """
    base, seeds = _checked(command.run, command.seeds)
    overwrite = command.run.overwrite
    if command.ablate is not None:
        if command.methods != tuple(METHODS):
            raise InputError("--methods: --ablate has other settings in their place; give one of them.")
        folder = command.run.out or Path("runs", f"ablate-{command.ablate}", _slug(base))
        study = ablate(base, command.ablate, command.values, seeds, folder, err, overwrite=overwrite)
    else:
        if command.values:
            raise InputError("--values are those of a setting; add --ablate skip_layers, keep_ratio or decay.")
        folder = command.run.out or Path("runs", "compare", _slug(base))
        study = compare(base, command.methods, seeds, folder, err, overwrite=overwrite)
    _show(study, folder, out)


def _checked(run: TuneConfig, seeds: int) -> tuple[TuneConfig, range]:
    """The settings of every run, and the seeds."""
    if not 1 <= seeds <= 1000:
        raise InputError(f"--seeds must be from 1 to 1000, how many there are; got {seeds}.")
    settings = {field.name: getattr(run, field.name) for field in dataclasses.fields(TuneConfig)}
    return TuneConfig(**settings | {"out": None, "overwrite": False}), range(seeds)


def _slug(config: TuneConfig) -> str:
    return f"{config.data}-{config.model}".replace(":", "-").replace("/", "-")


def _show(study: Study, folder: Path, out: Terminal) -> None:
    paths = study.write(folder, study_svg(study))
    for table in study.tables():
        out.print(table)
    out.print(f"  {'  '.join(map(str, paths))}", soft_wrap=True)
