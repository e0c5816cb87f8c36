"""Command that repeats a run or a study, from its options."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from typing import Any

_LEFT_OUT = {"resume", "overwrite", "config", "print_config", "trust"}  # they don't change what is computed


def command_line(command: str, options: Any, *, left_out: Collection[str] = ()) -> str:
    """Return the command of `skipkernels` with the options, fields of a dataclass, that differ from their default.

    `left_out` names options that the reader of the command chooses.

    Example:
        >>> from skipkernels.app.config import TuneConfig
        >>> command_line("tune", TuneConfig(data="imagefolder:my photos", graph=False, template=("a {}.", "the {}.")))
        "skipkernels tune --data 'imagefolder:my photos' --template 'a {}.' 'the {}.' --no-graph"
    """
    words = ["skipkernels", command]
    for field in dataclasses.fields(options):
        name, value = field.name, getattr(options, field.name)
        if value in (field.default, None) or name in _LEFT_OUT or name in left_out:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, (tuple, list)) else [value]
            words += [f"--{flag}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(words)
