"""`skipkernels protocol` and `skipkernels compare`: many runs with one command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import tyro

from skipkernels.app.console import Terminal
from skipkernels.app.option_groups import MethodOptions, OutputOptions, ProtocolOptions, RunOptions
from skipkernels.options import Protocol

from .errors import on_interrupt
from .options import Options, after_interrupt, show_study, study_folder, tune_config

if TYPE_CHECKING:
    from skipkernels.app.config import TuneConfig


@dataclasses.dataclass(frozen=True)
class StudyRunOptions(RunOptions):
    """Device."""

    seed: tyro.conf.Suppress[int] = RunOptions.seed


@dataclasses.dataclass(frozen=True)
class StudyOutputOptions(OutputOptions):
    """Output folder."""

    out: Path | None = None
    """Folder of the results. By default a folder in runs/ named after the study, data and model."""
    overwrite: bool = False
    """Run completed runs again."""
    resume: tyro.conf.Suppress[bool] = False


@dataclasses.dataclass(frozen=True)
class TargetOptions(ProtocolOptions):
    """Test sets."""

    protocol: tyro.conf.Suppress[Protocol | None] = None


@dataclasses.dataclass(frozen=True)
class ProtocolStudyOptions:
    """The other options apply to every run. Repeat an interrupted command to resume; complete runs are kept."""

    seeds: int = 3
    """Number of runs of each setting, with seeds 0, 1, …"""
    numbers_of_shots: tuple[int, ...] | None = None
    """Numbers of training images per class for few-shot. By default 1 2 4 8 16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolCommand(Options):
    """Run a protocol of the paper with several seeds, and write a table, a JSON file and a plot."""

    name: tyro.conf.Positional[Protocol | Literal["all"]]
    """Protocol. all: run all four."""
    study: ProtocolStudyOptions = ProtocolStudyOptions()
    protocol: TargetOptions = TargetOptions()
    run: StudyRunOptions = StudyRunOptions()
    output: StudyOutputOptions = StudyOutputOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Run the protocols. Returns 0."""
        from skipkernels.app.data import InputError
        from skipkernels.app.train.command_line import command_line

        config, shots = _run_config(self, self.study.seeds), self.study.numbers_of_shots
        if self.name == "few-shot" and config.shots is not None:
            raise InputError(f"--shots {config.shots} has no effect with few-shot; give --numbers-of-shots.")
        if self.name not in ("few-shot", "all") and shots is not None:
            raise InputError(f"--numbers-of-shots has no effect with {self.name}; give --shots.")
        names: tuple[Protocol, ...] = get_args(Protocol) if self.name == "all" else (self.name,)
        folder, overwrite = study_folder(self.output.out, "protocols", config), self.output.overwrite
        from skipkernels.app.studies.protocol import SHOTS, run_protocol  # imports torch

        with on_interrupt(after_interrupt(overwrite)):
            for name in names:
                seeds = range(self.study.seeds)
                study = run_protocol(config, name, seeds, folder / name, err, shots=shots or SHOTS, overwrite=overwrite)
                command = command_line("protocol", dataclasses.replace(self, name=name), ("name",))
                show_study(study, folder / name, out, command)
        return 0


@dataclasses.dataclass(frozen=True)
class VariantOptions(MethodOptions):
    """Settings of the methods."""

    method: tyro.conf.Suppress[str] = MethodOptions.method


@dataclasses.dataclass(frozen=True)
class CompareStudyOptions:
    """The other options apply to every run; by default each method uses its own recipe. On own data the learning rates
    of every method are first searched on the validation images: five runs of each, unless rates or --validation none
    are given. Repeat an interrupted command to resume; complete runs are kept.
    """

    methods: tuple[str, ...] | None = None
    """Methods to compare, such as auto skip full coop. By default all methods of tune --method but auto."""
    seeds: int = 3
    """Number of runs of each method, with seeds 0, 1, …"""


@dataclasses.dataclass(frozen=True)
class CompareCommand(Options):
    """Compare methods by accuracy, time and memory on this machine."""

    study: CompareStudyOptions = CompareStudyOptions()
    method: VariantOptions = VariantOptions()
    run: StudyRunOptions = StudyRunOptions()
    output: StudyOutputOptions = StudyOutputOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Run the comparison. Returns 0."""
        from skipkernels.app.methods.registry import METHODS
        from skipkernels.app.train.command_line import command_line

        config, overwrite = _run_config(self, self.study.seeds), self.output.overwrite
        methods, seeds = self.study.methods or tuple(METHODS), range(self.study.seeds)
        folder = study_folder(self.output.out, "compare", config)
        from skipkernels.app.studies.compare import compare  # imports torch

        with on_interrupt(after_interrupt(overwrite)):
            study = compare(config, methods, seeds, folder, err, overwrite=overwrite)
            show_study(study, folder, out, command_line("compare", self))
        return 0


def _run_config(options: Options, seeds: int) -> TuneConfig:
    """Configuration of every run of a study."""
    from skipkernels.app.data import InputError

    if not 1 <= seeds <= 1000:
        raise InputError(f"--seeds must be a number of runs from 1 to 1000; got {seeds}.")
    return tune_config(options, out=None, overwrite=False)
