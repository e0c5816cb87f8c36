"""`skipkernels compare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from skipkernels.app.console import Terminal
from skipkernels.app.settings import Settings

from .options import import_torch, tune_config


@dataclasses.dataclass(frozen=True)
class CompareCommand(Settings):
    """Compare methods by accuracy, time and memory on this machine.

    Settings apply to every run; by default each method uses its own recipe. On own data the learning rates of every
    method are first searched on the validation images: five runs of each, unless rates or --validation none are given.
    Repeat an interrupted command to resume; complete runs are kept.
    """

    methods: tuple[str, ...] | None = None
    """Methods to compare, such as auto skip full coop. By default all methods of tune --method but auto."""
    seeds: int = 3
    """Number of runs of each method, with seeds 0, 1, …"""
    out: Path | None = None
    """Folder of the results. By default a folder in runs/compare named after data and model."""
    overwrite: bool = False
    """Run completed runs again."""
    method: tyro.conf.Suppress[str] = Settings.method
    seed: tyro.conf.Suppress[int] = Settings.seed
    resume: tyro.conf.Suppress[Path | None] = None

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Run the comparison, write its files, and print its tables. Returns 0."""
        from skipkernels.app.data import InputError
        from skipkernels.app.data.files import expanded, file_name
        from skipkernels.app.methods.registry import METHODS
        from skipkernels.app.results.files import check_writable

        config = tune_config(self, out=None, overwrite=False)
        if not 1 <= self.seeds <= 1000:
            raise InputError(f"must be a number of runs from 1 to 1000; got {self.seeds}.", "seeds", "compare")
        folder = expanded(self.out or Path("runs", "compare", file_name(f"{config.data}-{config.model}")))
        check_writable(folder, "out", "compare")  # before the work is done
        import_torch(err)
        from skipkernels.app.report.study_page import explained, headline, tables
        from skipkernels.app.studies.compare import compare, write_study

        methods = tuple(METHODS) if self.methods is None else self.methods
        command = self.command("compare")
        try:
            study = compare(config, methods, range(self.seeds), folder, err, overwrite=self.overwrite, command=command)
            paths = write_study(study, folder)
        except KeyboardInterrupt as error:
            again = f"repeat the command{' without --overwrite' if self.overwrite else ''} to resume"
            error.args = (f"complete runs are kept; {again}",)
            raise
        for table in tables(study):
            out.print(table.in_terminal(study.title))
        for sentence in (explained(study), headline(study)):
            out.print(sentence, soft_wrap=True)
        out.print(f"  {'  '.join(map(str, paths))}", soft_wrap=True)
        return 0
