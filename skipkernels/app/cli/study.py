"""Parts shared by `skipkernels protocol` and `skipkernels compare`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from skipkernels.app.console import Terminal

from .options import Options, tune_config

if TYPE_CHECKING:
    from skipkernels.app.config import TuneConfig
    from skipkernels.app.studies.study import Study


def run_config(options: Options, seeds: int) -> TuneConfig:
    """Configuration of every run of a study.

    Raises:
        InputError: If the number of seeds is out of range.
    """
    from skipkernels.app.data import InputError

    if not 1 <= seeds <= 1000:
        raise InputError(f"--seeds must be a number of runs from 1 to 1000; got {seeds}.")
    return tune_config(options, out=None, overwrite=False)


def default_folder(name: str, config: TuneConfig) -> Path:
    """Folder of a study if --out is not given."""
    return Path("runs", name, f"{config.data}-{config.model}".replace(":", "-").replace("/", "-"))


def show(study: Study, folder: Path, out: Terminal, command: str) -> None:
    """Write the files of a study, with the command that repeats it, and print its tables."""
    from skipkernels.app.studies.plots import study_svg

    paths = dataclasses.replace(study, command=command).write(folder, study_svg(study))
    for table in study.tables():
        out.print(table)
    out.print(f"  {'  '.join(map(str, paths))}", soft_wrap=True)


def after_interrupt(overwrite: bool) -> str:
    """Message that says how to resume a study after Ctrl-C."""
    return f"complete runs are kept; repeat the command{' without --overwrite' if overwrite else ''} to resume"
