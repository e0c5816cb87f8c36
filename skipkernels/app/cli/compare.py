"""`skipkernels compare`."""

from __future__ import annotations

import dataclasses
from functools import partial

import tyro

from skipkernels.app.console import Terminal
from skipkernels.app.option_groups import MethodOptions
from skipkernels.options import Ablated

from .interrupt import on_interrupt
from .options import Options, StudyOutputOptions, StudyRunOptions
from .study import after_interrupt, default_folder, run_config, show


@dataclasses.dataclass(frozen=True)
class VariantOptions(MethodOptions):
    """Settings of the methods."""

    method: tyro.conf.Suppress[str] = MethodOptions.method


@dataclasses.dataclass(frozen=True)
class StudyOptions:
    """The other options apply to every run; by default each method uses its own recipe. On own data the learning rates
    of every method are first searched on the validation images: five runs of each, unless rates or --validation none
    are given. Repeat an interrupted command to resume; complete runs are kept.
    """

    methods: tuple[str, ...] | None = None
    """Methods to compare, such as skip full coop. By default all methods of tune --method."""
    ablate: Ablated | None = None
    """Compare values of this setting of Skip Tuning, instead of methods."""
    values: tuple[int | float, ...] = ()
    """Values of the setting of --ablate. By default five values from small to large."""
    seeds: int = 3
    """Number of runs of each method or value, with seeds 0, 1, …"""
    blend: bool = False
    """Also show each method that tunes the weights of the model itself blended with the zero-shot model; see
    blend --help."""


@dataclasses.dataclass(frozen=True)
class CompareCommand(Options):
    """Compare methods, or values of a setting of Skip Tuning, by accuracy, time and memory on this machine."""

    study: StudyOptions = StudyOptions()
    method: VariantOptions = VariantOptions()
    run: StudyRunOptions = StudyRunOptions()
    output: StudyOutputOptions = StudyOutputOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Run the comparison. Returns 0.

        Raises:
            InputError: If an option is invalid.
        """
        import skipkernels.app.studies.compare as studies
        from skipkernels.app import serve
        from skipkernels.app.data import InputError
        from skipkernels.app.methods.registry import METHODS
        from skipkernels.app.train.command_line import command_line

        config, overwrite = run_config(self, self.study.seeds), self.output.overwrite
        seeds, setting, values = range(self.study.seeds), self.study.ablate, self.study.values
        if setting is not None and self.study.methods is not None:
            raise InputError("--methods: --ablate compares values of a setting, not methods; give one of the two.")
        if setting is None and values:
            raise InputError("--values needs a setting; add --ablate skip_layers, keep_ratio or decay.")
        folder = self.output.out or default_folder("compare" if setting is None else f"ablate-{setting}", config)
        with on_interrupt(after_interrupt(overwrite)):
            blend = partial(serve.blend, overwrite=True, trust=True) if self.study.blend else None
            if setting is None:
                methods = self.study.methods or tuple(METHODS)
                study = studies.compare(config, methods, seeds, folder, err, overwrite=overwrite, blend=blend)
            else:
                study = studies.ablate(config, setting, values, seeds, folder, err, overwrite=overwrite, blend=blend)
            show(study, folder, out, command_line("compare", self))
        return 0
