"""`skipkernels protocol`."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import tyro

from skipkernels.app.console import Terminal
from skipkernels.app.option_groups import ProtocolOptions
from skipkernels.options import Protocol

from .interrupt import on_interrupt
from .options import Options, StudyOutputOptions, StudyRunOptions
from .study import after_interrupt, default_folder, run_config, show


@dataclasses.dataclass(frozen=True)
class TargetOptions(ProtocolOptions):
    """Test sets."""

    protocol: tyro.conf.Suppress[Protocol | None] = None


@dataclasses.dataclass(frozen=True)
class StudyOptions:
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
    study: StudyOptions = StudyOptions()
    protocol: TargetOptions = TargetOptions()
    run: StudyRunOptions = StudyRunOptions()
    output: StudyOutputOptions = StudyOutputOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Run the protocols. Returns 0.

        Raises:
            InputError: If an option is invalid.
        """
        from skipkernels.app.config import TuneConfig
        from skipkernels.app.data import InputError
        from skipkernels.app.studies.protocol import SHOTS, run_protocol
        from skipkernels.app.train.command_line import command_line

        config, shots = run_config(self, self.study.seeds), self.study.numbers_of_shots
        if self.name == "few-shot" and config.shots != TuneConfig.shots:
            raise InputError(f"--shots {config.shots} has no effect with few-shot; give --numbers-of-shots.")
        if self.name not in ("few-shot", "all") and shots is not None:
            raise InputError(f"--numbers-of-shots has no effect with {self.name}; give --shots.")
        names: tuple[Protocol, ...] = get_args(Protocol) if self.name == "all" else (self.name,)
        folder, overwrite = self.output.out or default_folder("protocols", config), self.output.overwrite
        with on_interrupt(after_interrupt(overwrite)):
            for name in names:
                seeds = range(self.study.seeds)
                study = run_protocol(config, name, seeds, folder / name, err, shots=shots or SHOTS, overwrite=overwrite)
                command = command_line("protocol", dataclasses.replace(self, name=name), ("name",))
                show(study, folder / name, out, command)
        return 0
