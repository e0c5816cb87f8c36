"""Command that repeats a run or a study, from its options."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import Any

_LEFT_OUT = {"resume", "overwrite", "config", "print_config", "trust"}  # they don't change what is computed


def command_line(command: str, options: Any, *, left_out: Collection[str] = ()) -> str:
    """Return the command of `skipkernels` with the options, of a dataclass or its groups, that have been changed.

    `left_out` names options that the reader of the command chooses.

    Example:
        >>> from skipkernels.app.config import TuneConfig
        >>> command_line("tune", TuneConfig(data="imagefolder:my photos", graph=False, template=("a {}.", "the {}.")))
        "skipkernels tune --data 'imagefolder:my photos' --template 'a {}.' 'the {}.' --no-graph"
    """
    words = ["skipkernels", command]
    for name, value in _changed(options):
        flag = name.replace("_", "-")
        if name in left_out:
            continue
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
