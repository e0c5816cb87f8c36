"""`--config FILE`: defaults of the options from a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from skipkernels.app.config import TuneConfig

_FLAG = "--config"
_AS_GIVEN = ("device", "precision", "out")  # settings with defaults that depend on the machine or on other settings
Command = TypeVar("Command")


def named_in(arguments: list[str]) -> Path | None:
    """Return the file that the arguments name, the last of several; None if there is none.

    >>> named_in(["tune", "--config", "a.yaml", "--seed", "1"]), named_in(["tune", "--config=b.yaml"]), named_in([])
    (PosixPath('a.yaml'), PosixPath('b.yaml'), None)
    """
    found = None
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word == _FLAG and following and not following.startswith("--"):
            found = Path(following)
        elif word.startswith(f"{_FLAG}="):
            found = Path(word.partition("=")[2])
    return found


def with_file(command: Command, path: Path, arguments: list[str]) -> Command:
    """Return a command with the settings of a file as defaults.

    The config.yaml in a run folder has the folder of that run, which is left out: this is another run. The author
    of the file may be unknown, so it may name sources only if the arguments have --trust, or the same option.

    Raises:
        InputError: If the file can't be used.
    """
    from skipkernels.app.config import NOT_IN_FILES, TuneConfig

    given = {word.partition("=")[0].removeprefix("--") for word in arguments if word.startswith("--")}
    config = TuneConfig.from_yaml(path, trust="trust" in given, given=given)
    values: dict[str, Any] = {name: value for name, value in vars(config).items() if name not in NOT_IN_FILES}
    if config.out is not None and config.out.absolute() == path.parent.absolute():
        values |= {"out": None, "resume": False, "overwrite": False}
    return _replaced(command, values)


def _replaced(options: Any, values: dict[str, Any]) -> Any:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _replaced(value, values)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return dataclasses.replace(options, **changes)


def as_yaml(config: TuneConfig) -> str:
    """Return the settings of a run as a file for `--config`, with the defaults of its method filled in."""
    from skipkernels.app.schema import ADDRESS

    resolved = dataclasses.replace(config.resolved(), **{name: getattr(config, name) for name in _AS_GIVEN})
    return f"# yaml-language-server: $schema={ADDRESS}\n{resolved.to_yaml()}"
