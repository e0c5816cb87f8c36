"""Command that repeats a run or a study, from its options."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import Any

_LEFT_OUT = {"resume", "overwrite", "config", "print_config", "trust"}  # they don't change what is computed


def command_line(
    command: str,
    options: Any,
    positional: Sequence[str] = (),
    *,
    left_out: Collection[str] = (),
) -> str:
    """Return the command of `skipkernels` with the options, of a dataclass or its groups, that have been changed.

    `positional` names fields that are positional arguments; `left_out` those that the reader of the command chooses.

    Example:
        >>> from skipkernels.app.config import TuneConfig
        >>> command_line("tune", TuneConfig(data="imagefolder:my photos", graph=False, template=("a {}.", "the {}.")))
        "skipkernels tune --data 'imagefolder:my photos' --template 'a {}.' 'the {}.' --no-graph"
    """
    words = ["skipkernels", command]
    found = {name: value for name, value in _changed(options) if name not in left_out}
    given = [_values(found.pop(name)) for name in positional if name in found]
    words += [shlex.quote(str(one)) for values in given for one in values]
    for name, value in found.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *(shlex.quote(str(one)) for one in _values(value))]
    return " ".join(words)


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (tuple, list)) else [value]


def _changed(options: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the options that differ from their default."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _changed(value)
        elif value != field.default and value is not None and field.name not in _LEFT_OUT:
            yield field.name, value
