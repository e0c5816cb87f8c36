"""Translation of the library's error messages for the command line: flags for names of Python arguments."""

from __future__ import annotations

import dataclasses
import re

from skipkernels.app.config import TuneConfig

_FLAGS = {"templates": "template", "text_cache": "cache"}  # Python argument → flag, where they differ
_POSITIONAL = {"run": "RUN", "images": "IMAGES"}  # Python argument → its name in the usage
_OTHERS = ("sort_into", "push")  # in messages, and not a field of TuneConfig
_ARGUMENTS = "|".join([*(field.name for field in dataclasses.fields(TuneConfig)), *_FLAGS, *_OTHERS])
_FUNCTION = r"^([^:]+: )?(?:[a-z_]\w*|[A-Z]\w*(?:\.\w+)?): "  # optionally after a prefix, such as the name of a variant
_ONLY_IN_PYTHON = ", or a tuple (image, text) of either"  # values of skip_layers


def with_flags(error: BaseException) -> str:
    """Return the message of an error with flags in place of Python arguments.

    The invalid argument is `error.argument`, or else the first word after the function's name. Other arguments are
    translated if they are in backquotes or have a value (`name=value`).

    >>> from skipkernels.app.data import InputError
    >>> with_flags(InputError("few_shot: shots must be at least 1; got 0.", "shots"))
    '--shots must be at least 1; got 0.'
    >>> with_flags(InputError("open_source: coop:dtd: no folder data/dtd. Fetch it with `download=True`.", "root"))
    '--root: coop:dtd: no folder data/dtd. Fetch it with --download.'
    >>> with_flags(ValueError("SkipCLIP: text_cache keeps features at the cut; with skip_layers=0 there is no cut."))
    '--cache keeps features at the cut; with --skip-layers 0 there is no cut.'
    >>> with_flags(InputError("full: open_source: no dataset 'x'.", "data"))
    "full: --data: no dataset 'x'."
    >>> with_flags(ValueError('SkipCLIP: attention="xformers" cannot be used: there is no GPU.'))
    '--attention xformers cannot be used: there is no GPU.'
    >>> with_flags(InputError("config.yaml: seed must be an integer; got 'a'."))
    "config.yaml: seed must be an integer; got 'a'."
    """
    message, argument = str(error).replace(_ONLY_IN_PYTHON, ""), getattr(error, "argument", None)
    found = re.match(rf"{_FUNCTION}({argument or _ARGUMENTS})\b(?!=)", message)
    if found:
        message = f"{found[1] or ''}{_flag(found[2])}{message[found.end() :]}"
    elif found := re.match(rf"{_FUNCTION}(?=({_ARGUMENTS})=)", message):  # the value is translated below
        message = f"{found[1] or ''}{message[found.end() :]}"
    elif argument is not None:
        found = re.match(_FUNCTION, message)
        prefix, rest = (found[1] or "", message[found.end() :]) if found else ("", message)
        message = f"{prefix}{_flag(argument)}: {rest}"
    message = re.sub(rf"`({_ARGUMENTS})(?:=True|=…)?`", lambda found: _flag(found[1]), message)
    value = rf'(?<![\w/.-])`?({_ARGUMENTS})="?([\w.-]+)"?`?(?![\w/])'
    return re.sub(value, lambda found: f"{_flag(found[1])} {found[2]}", message)


def _flag(argument: str) -> str:
    return _POSITIONAL.get(argument) or "--" + _FLAGS.get(argument, argument).replace("_", "-")
