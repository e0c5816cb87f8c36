"""Errors of tyro about arguments, in one line: option, expected, got, and the command that explains it."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Collection
from itertools import takewhile

_TYPES = {"INT": "a whole number", "FLOAT": "a number"}
_CHOICE = re.compile(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?)\)")
_MISSING_VALUE = re.compile(r"Missing value for argument '(.*?)'")
_VALUE = re.compile(r"Error parsing (\S+): (.*)")
_VALUES = {  # message of a type → its name in the usage, if the message does not have it
    re.compile(r"no type matching (?P<type>.*?) could be instantiated from \['(?P<got>.*?)'"): "",
    re.compile(r"invalid literal for int\(\) with base 10: '(?P<got>.*?)'"): "INT",
    re.compile(r"could not convert string to float: '(?P<got>.*?)'"): "FLOAT",
    re.compile(r"Could not find valid parse for arguments: \['(?P<got>.*?)'"): "FLOAT",  # of a list INT|FLOAT
}
_ACTIONS = re.compile(r"Expected one of \{(.*?)\}")


def in_one_line(box: str, arguments: list[str]) -> str:
    """Return an error of tyro, which it prints in a box, as one line.

    >>> box = '''╭─ Value error ────────────────────────────────────────────╮
    ... │ Error parsing --shots: no type matching INT|{all} could  │
    ... │ be instantiated from ['x'].                              │
    ... │ ──────────────────────────────────────────────────────── │
    ... │ Argument helptext:                                       │
    ... │     --shots INT|{all}                                    │
    ... ╰──────────────────────────────────────────────────────────╯'''
    >>> in_one_line(box, ["tune", "--shots", "x"])
    "--shots must be a whole number or all; got 'x'. See skipkernels tune --help."
    """
    lines = re.sub(r"\x1b\[[\d;]*m", "", box).splitlines()
    rows = [line.strip("│") for line in lines if line.strip() and line[0] not in "╭╰"]
    if "╭" not in box:  # stdout is not UTF-8: a title and a line, in place of the border
        rows = rows[2:]
    rows = textwrap.dedent("\n".join(rows)).splitlines()
    rows = list(takewhile(lambda row: not re.match("[─-]{3}", row), rows))  # an explanation follows
    return f"{_message(rows, arguments)} See {' '.join(['skipkernels', *arguments[:1]])} --help."


def _message(rows: list[str], arguments: list[str]) -> str:
    command, text = " ".join(arguments[:1]) or "skipkernels", " ".join(" ".join(rows).split())
    if found := _CHOICE.search(text):
        given, argument, choices = found.groups()
        names = {name for name in re.findall(r"'([^']*)'", choices) if name != "None"}  # tyro's order is that of a set
        ordered = sorted(names, key=lambda name: (len(name), name))
        expected = f"{'one of ' if ordered[1:] else ''}{', '.join(ordered)}"
        return f"{_named(argument)} must be {expected}; got {given!r}.{_meant(given, ordered)}"
    if found := _MISSING_VALUE.search(text):
        return f"{_named(found[1])} must have a value; got none."
    if found := _VALUE.search(text):
        argument, problem = found.groups()
        for pattern, name in _VALUES.items():
            if value := pattern.match(problem):
                return f"{argument} must be {_expected(name or value['type'])}; got {value['got']!r}."
        return f"{argument}: {problem}."
    if text.startswith("Missing from"):
        missing = [row.strip() for row in rows if re.match(r" {4}\S", row)]  # with help texts below, indented further
        return f"{command}: {', '.join(missing)} must be given."
    if found := _ACTIONS.search(text):
        given = " ".join(arguments[1:2])
        expected, got = f"{command} must be followed by one of {found[1]}", repr(given) if given else "none"
        return f"{expected}; got {got}.{_meant(given, found[1].split(', '))}"
    return text


def _named(argument: str) -> str:
    """Flag, or name of a positional argument in the usage."""
    return argument if argument.startswith("-") else argument.rpartition(".")[2].upper()


def _expected(usage: str) -> str:
    """Return what the name of a type in the usage means.

    >>> _expected("{auto,none,split}|FLOAT"), _expected("INT|FLOAT")
    ('auto, none, split or a number', 'a number')
    """
    types = re.sub(r"\s", "", usage).split("|")  # a narrow terminal may break it
    types = [name for name in types if name != "INT" or "FLOAT" not in types]
    return " or ".join(_TYPES.get(name, name.strip("{}").replace(",", ", ")) for name in types)


def _meant(given: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(given, names, 1)
    return f" Did you mean {close[0]}?" if close and not close[0].isdigit() else ""
