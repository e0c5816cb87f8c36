"""Option groups of the commands, and their conversion to `TuneConfig`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import tyro

from skipkernels.app import option_groups
from skipkernels.app.option_groups import (
    CacheOptions,
    ComputeOptions,
    DataOptions,
    HeadOptions,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    ProtocolOptions,
    RunOptions,
    SkipOptions,
    TrainingOptions,
)
from skipkernels.options import Precision

if TYPE_CHECKING:
    from skipkernels.app.config import TuneConfig
    from skipkernels.app.console import Terminal

BASIC = {"data", "model", "pretrained", "method", "head", "blend", "shots", "epochs", "out", "resume"}
"""Settings of a run that --help shows, besides the options of the command itself; --help-all shows all."""

_READ = "read"  # marks a type for tyro's own rule

Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
"""Type of the positional argument RUN, the folder of a run."""

Trust = Annotated[
    bool,
    tyro.conf.arg(
        help="Also load what a file in the folder of the run names: models and datasets of the hub, models and weights "
        "in other folders. Code in the folder never runs."
    ),
]
"""Type of the option --trust."""

Top = Annotated[int, tyro.conf.arg(help="Number of classes for each image, best first.")]
"""Type of the option --top."""

Threshold = Annotated[
    float | None,
    tyro.conf.arg(
        help='Smallest probability, from 0 to 1, of the best class: images below it get the label "none of these". '
        "report.html of the run has thresholds with their accuracy."
    ),
]
"""Type of the option --threshold."""

Device = Annotated[str | None, tyro.conf.arg(help="cpu, cuda, cuda:1, …. By default cuda if there is one, else cpu.")]
"""Type of the option --device of a command that applies a run."""

PrecisionOption = Annotated[Precision, tyro.conf.arg(help="auto is bf16 on a GPU that has it, else fp32.")]
"""Type of the option --precision of such a command."""


@dataclasses.dataclass(frozen=True)
class Options:
    """All options of a training run."""

    data: DataOptions = DataOptions()
    protocol: ProtocolOptions = ProtocolOptions()
    model: ModelOptions = ModelOptions()
    method: MethodOptions = MethodOptions()
    head: HeadOptions = HeadOptions()
    skip: SkipOptions = SkipOptions()
    training: TrainingOptions = TrainingOptions()
    compute: ComputeOptions = ComputeOptions()
    cache: CacheOptions = CacheOptions()
    run: RunOptions = RunOptions()
    output: OutputOptions = OutputOptions()


def tune_config(options: Any, **changes: Any) -> TuneConfig:
    """Convert the options of a command to the configuration of a run.

    Options that are not fields of `TuneConfig` are ignored; `changes` replace fields.
    """
    from skipkernels.app.config import TuneConfig

    names = {field.name for field in dataclasses.fields(TuneConfig)}
    return TuneConfig(**{name: value for name, value in settings(options).items() if name in names} | changes)


def settings(options: Any) -> dict[str, Any]:
    """Options of a command and of its option groups, by name."""
    found: dict[str, Any] = {}
    for name, value in vars(options).items():
        found |= settings(value) if dataclasses.is_dataclass(value) else {name: value}
    return found


def replaced(options: Any, values: dict[str, Any]) -> Any:
    """Return the options of a command and of its groups with the values that have their names."""
    changes: dict[str, Any] = {}
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value):
            changes[name] = replaced(value, values)
        elif name in values:
            changes[name] = values[name]
    return dataclasses.replace(options, **changes)


def note_unfinished(run: Path, err: Terminal) -> None:
    """Print a note on the model of a run that is not complete."""
    from skipkernels.app.train.run_folder import unfinished

    if (note := unfinished(run.expanduser())) is not None:
        err.print(f"note: {note}", soft_wrap=True)


def registry(*, basic: bool) -> tyro.constructors.ConstructorRegistry:
    """Return the rules by which tyro reads options. With `basic`, help texts have only the settings in `BASIC`."""
    rules = tyro.constructors.ConstructorRegistry()

    @rules.struct_rule
    def rule(info: tyro.constructors.StructTypeInfo) -> Any:
        if _READ in info.markers or not dataclasses.is_dataclass(info.type):
            return None
        read = dataclasses.replace(info, markers=(*info.markers, _READ))
        spec: Any = tyro.constructors.ConstructorRegistry.get_struct_spec(read)  # by tyro's own rule
        of_run = any(one.__module__ == option_groups.__name__ for one in info.type.__mro__)
        fields = tuple(_field(field, basic and of_run) for field in spec.fields)
        return dataclasses.replace(spec, fields=fields)

    @rules.primitive_rule
    def choices_rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        """Leave None, the default of an option, out of its choices."""
        options = [each for each in get_args(info.type) if each is not NoneType]
        if len(options) != 1 or get_origin(options[0]) is not Literal:
            return None
        of_literal = tyro.constructors.PrimitiveTypeInfo.make(options[0], info.markers)
        spec: Any = tyro.constructors.ConstructorRegistry.get_primitive_spec(of_literal)
        return dataclasses.replace(spec, is_instance=lambda value: value is None or spec.is_instance(value))

    return rules


def _field(field: tyro.constructors.StructFieldSpec, basic: bool) -> tyro.constructors.StructFieldSpec:
    """Leave out "(default: None)", because help texts state the default, and join the lines of help texts."""

    def helptext(text: Any = field.helptext) -> str | None:
        text = text() if callable(text) else text
        return text and " ".join(text.split())

    hint: Any = field.type
    if field.default is None or field.default == ():
        hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
    if basic and field.name not in BASIC:
        hint = Annotated[hint, tyro.conf.Suppress]
    return dataclasses.replace(field, type=hint, helptext=helptext)
