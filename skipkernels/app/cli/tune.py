"""`skipkernels tune`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipkernels.app.console import Terminal
from skipkernels.app.settings import Settings

from .options import SETTINGS, import_torch, tune_config

if TYPE_CHECKING:
    from skipkernels.app.config import TuneConfig

_NOT_FROM_FILE = ("out", "overwrite", "resume", "trust")  # settings that are not taken from the file of --config
_AS_GIVEN = ("device", "precision", "out")  # printed as given: resolved, they depend on the machine or other settings


@dataclasses.dataclass(frozen=True)
class TuneCommand(Settings):
    """Tune a CLIP model on a dataset, and test it, also on new classes or other datasets."""

    config: Path | None = None
    """YAML or JSON file with settings, such as the config.yaml of a run or the output of --print-config. Options given
    here replace those of the file. --out, --overwrite, --resume and --trust are not taken from it."""
    print_config: bool = False
    """Print all settings as YAML, with the defaults of the method, and exit."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Tune, and print accuracy and cost. Returns 0."""
        config = tune_config(self)
        if self.print_config:
            as_given = {name: getattr(config, name) for name in _AS_GIVEN}
            out.print(dataclasses.replace(config.resolved(), **as_given).to_yaml().rstrip(), soft_wrap=True)
            return 0
        import_torch(err)
        from skipkernels.app.config import CONFIG
        from skipkernels.app.train import tune

        metrics = tune(config, err)
        _show(config.from_yaml(config.folder / CONFIG, trust=True), metrics, out)  # nothing is loaded
        return 0


def _show(config: TuneConfig, metrics: dict[str, Any], out: Terminal) -> None:
    """Print the tables of a run, and the names of its files."""
    from skipkernels.app.report import summary
    from skipkernels.app.report.words import title_of
    from skipkernels.app.results.files import RUN_FILES

    assert config.out is not None
    if metrics["candidates"]:
        out.print(summary.candidate_table(metrics, best=summary.BEST).in_terminal())
    out.print(summary.accuracy_table(metrics).in_terminal(title_of(config, metrics["classifier"])))
    for text in (summary.choice(metrics), summary.kept_epoch(config, metrics)):
        if text is not None:
            out.print(text, soft_wrap=True)
    out.print(summary.cost_table(config, metrics).in_terminal())
    files = "  ".join(name for name in RUN_FILES if (config.out / name).exists())
    out.print(f"{config.out}:  {files}", soft_wrap=True)


def command_with_file(arguments: list[str], err: Terminal) -> TuneCommand:
    """Return the default command, with the settings of the file of --config, or of --resume RUN, as defaults.

    The file is not trusted: sources that it names need --trust, unless an option replaces them.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    parser.add_argument("--resume", nargs="?")
    named = parser.parse_known_args(arguments)[0]
    if named.config is None and named.resume is None:
        return TuneCommand()
    from skipkernels.app.config import CONFIG, TuneConfig
    from skipkernels.app.results.files import existing_run

    file = existing_run(named.resume, "tune", "resume") / CONFIG if named.config is None else Path(named.config)
    given = {word.partition("=")[0].removeprefix("--") for word in arguments if word.startswith("--")}
    config = TuneConfig.from_yaml(file, trust="trust" in given, given=given)
    left_out = [name for name in _NOT_FROM_FILE if getattr(config, name) and name not in given]
    if left_out and named.config is not None:
        err.print(f"note: not taken from {file}: {', '.join(f'--{name}' for name in left_out)}", soft_wrap=True)
    return TuneCommand(**{name: getattr(config, name) for name in SETTINGS if name not in _NOT_FROM_FILE})
