"""Translation of the library's error messages for the command line: flags for names of Python arguments."""

from __future__ import annotations

import dataclasses
import re

from skipkernels.tuner import TuneConfig

_FLAGS = {"templates": "template", "text_cache": "cache"}  # Python argument → flag, where they differ
_ARGUMENTS = "|".join([*(field.name for field in dataclasses.fields(TuneConfig)), *_FLAGS])
_FUNCTION = r"^[A-Za-z][\w.]*: "
_ONLY_IN_PYTHON = ", or a tuple (image, text) of either"  # values of skip_layers


def with_flags(error: BaseException) -> str:
    """Return the message of an error with flags in place of Python arguments.

    The argument is `error.argument`, or the first word behind the name of the function. Others are translated where
    they are in backquotes or have a value.

    >>> from skipkernels.data import InputError
    >>> with_flags(InputError("few_shot: shots must be at least 1; got 0.", "shots"))
    '--shots must be at least 1; got 0.'
    >>> with_flags(InputError("open_source: coop:dtd: no folder data/dtd. Fetch it with `download=True`.", "root"))
    '--root: coop:dtd: no folder data/dtd. Fetch it with --download.'
    >>> with_flags(ValueError("SkipCLIP: text_cache is for what is below a cut; with skip_layers=0 there is nothing."))
    '--cache is for what is below a cut; with --skip-layers 0 there is nothing.'
    >>> with_flags(InputError("photos/a.png: no such file."))
    'photos/a.png: no such file.'
    """
    message, argument = str(error).replace(_ONLY_IN_PYTHON, ""), getattr(error, "argument", None)
    names = argument or _ARGUMENTS
    message, named = re.subn(rf"{_FUNCTION}(?=({names})\b)", "", message)
    if named:
        message = re.sub(rf"^({names})\b(?!=)", lambda found: _flag(found[1]), message)
    elif argument is not None:
        message = f"{_flag(argument)}: {re.sub(_FUNCTION, '', message)}"
    message = re.sub(rf"`({_ARGUMENTS})(?:=True|=…)?`", lambda found: _flag(found[1]), message)
    value = rf'(?<![\w/.-])`?({_ARGUMENTS})="?([\w.-]+)"?`?(?![\w/])'
    return re.sub(value, lambda found: f"{_flag(found[1])} {found[2]}", message)


def _flag(argument: str) -> str:
    return "--" + _FLAGS.get(argument, argument).replace("_", "-")
