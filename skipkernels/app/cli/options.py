"""Options that several commands have, and the rules by which tyro reads all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from skipkernels.app.settings import Settings
from skipkernels.options import Precision

if TYPE_CHECKING:
    from skipkernels.app.config import TuneConfig
    from skipkernels.app.console import Terminal

SETTINGS = [field.name for field in dataclasses.fields(Settings)]
BASIC = {"data", "model", "pretrained", "method", "head", "blend", "shots", "epochs", "out", "overwrite", "resume"}
"""Settings of a run that --help shows, besides the options of the command itself; --help-all shows all."""

_READ = "read"  # marks a type for tyro's own rule

# Types of the options of commands that take a run.
Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]

Trust = Annotated[
    bool,
    tyro.conf.arg(
        help="Also load what a file in the folder of the run names: models and datasets of the hub, models and weights "
        "in other folders. Code in the folder never runs."
    ),
]

Top = Annotated[int, tyro.conf.arg(help="Number of classes for each image, best first.")]

Threshold = Annotated[
    float | None,
    tyro.conf.arg(
        help='Smallest probability, from 0 to 1, of the best class: images below it get the label "none of these". '
        "report.html of the run has thresholds with their accuracy."
    ),
]

Device = Annotated[str | None, tyro.conf.arg(help="cpu, cuda, cuda:1, …. By default cuda if there is one, else cpu.")]

PrecisionOption = Annotated[Precision, tyro.conf.arg(help="auto is bf16 on a GPU that has it, else fp32.")]


def tune_config(command: Settings, **changes: Any) -> TuneConfig:
    """Return the configuration of a run with the settings of a command, some of which `changes` replace."""
    from skipkernels.app.config import TuneConfig

    return TuneConfig(**{name: getattr(command, name) for name in SETTINGS} | changes)


def check_run(run: Path, function: str, err: Terminal) -> None:
    """Raise an InputError unless a folder has a run, and print a note on the model of one that is not complete."""
    from skipkernels.app.results.files import existing_run
    from skipkernels.app.train.reading import unfinished

    if (note := unfinished(existing_run(run, function))) is not None:
        err.print(f"note: {note}", soft_wrap=True)


def import_torch(err: Terminal) -> None:
    """Import PyTorch and open_clip, which takes seconds; a terminal shows a line meanwhile."""
    with err.status("loading PyTorch"):
        import numpy  # noqa: F401, I001 -- here: an import by torch's C++ code discards the exception of Ctrl-C
        import open_clip  # noqa: F401


def registry(*, basic: bool) -> tyro.constructors.ConstructorRegistry:
    """Return the rules by which tyro reads options. With `basic`, help texts have only the settings in `BASIC`."""
    rules = tyro.constructors.ConstructorRegistry()

    @rules.struct_rule
    def help_rule(info: tyro.constructors.StructTypeInfo) -> Any:
        if _READ in info.markers or not dataclasses.is_dataclass(info.type):
            return None
        hidden = set(SETTINGS) - BASIC if basic and issubclass(info.type, Settings) else set()
        read = dataclasses.replace(info, markers=(*info.markers, _READ))
        spec: Any = tyro.constructors.ConstructorRegistry.get_struct_spec(read)  # by tyro's own rule
        return dataclasses.replace(spec, fields=tuple(_field(field, hidden) for field in spec.fields))

    return rules


def _field(field: tyro.constructors.StructFieldSpec, hidden: set[str]) -> tyro.constructors.StructFieldSpec:
    """Leave out "(default: None)", because help texts state the default, and join the lines of help texts."""

    def helptext(text: Any = field.helptext) -> str | None:
        text = text() if callable(text) else text
        return text and " ".join(text.split())

    hint: Any = field.type
    if field.default in (None, ()):
        hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
    if field.name in hidden:
        hint = Annotated[hint, tyro.conf.Suppress]
    return dataclasses.replace(field, type=hint, helptext=helptext)
