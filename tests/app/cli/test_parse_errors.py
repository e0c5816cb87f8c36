"""Errors about arguments are one line without names of Python's types."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skipkernels.app.cli.main import COMMANDS, main

POSITIONAL = {
    "tune": [],
    "compare": [],
    "protocol": ["few-shot"],
    "predict": ["run", "images"],
}
FOREIGN = {"typing", "Literal", "class", "INT", "FLOAT", "None", "│", "|"}  # words of Python and of tyro's boxes


def options(hint: Any) -> Iterator[tuple[str, Any]]:
    """Options of a command and of its groups, with their types."""
    for field, its_hint in typing.get_type_hints(hint).items():
        if dataclasses.is_dataclass(its_hint):
            yield from options(its_hint)
        elif field not in ("name", "action"):  # positional
            yield f"--{field.replace('_', '-')}", its_hint


def parts(hint: Any) -> set[Any]:
    """Types of a union or a tuple, with `Literal[…]` as one type."""
    inner = () if typing.get_origin(hint) is typing.Literal else typing.get_args(hint)
    return set().union(*map(parts, inner)) if inner else {hint}


def of_each_type() -> list[Any]:
    """An option of each type that not every text is a value of, with its command."""
    found: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        for flag, hint in options(command):
            if not parts(hint) & {str, Path, bool}:
                found.setdefault(str(hint), pytest.param(name, flag, id=f"{name} {flag}"))
    return list(found.values())


def error(arguments: list[str], capsys: Any) -> str:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not FOREIGN & set(line.replace("'", " ").replace(".", " ").split()), line
    return line


@pytest.mark.parametrize(("name", "flag"), of_each_type())
def test_invalid_value(name, flag, capsys):
    message = error([name, *POSITIONAL.get(name, ["run"]), flag, "wrong!"], capsys)
    assert message.startswith(f"error {flag} must be ") and "; got 'wrong!'." in message
    assert message.endswith(f" See skipkernels {name} --help.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export"], "export: RUN, --to {open-clip,hugging-face,onnx}, --out PATH must be given."),
        (
            ["tune", "--class-weight", "balancd"],
            "--class-weight must be balanced; got 'balancd'. Did you mean balanced?",
        ),
        (["export", "run", "--to"], "--to must have a value; got none."),
        (["blend", "run", "--alpha", "x"], "--alpha must be a number or auto; got 'x'."),
        (
            ["protocol", "x"],
            "NAME must be one of all, few-shot, base-to-new, cross-dataset, domain-generalization; got 'x'.",
        ),
        (["predict", "run", "x", "--crops", "11"], "--crops must be one of 1, 5, 10; got '11'."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_message(arguments, message, capsys):
    assert error(arguments, capsys) == f"error {message} See skipkernels {arguments[0]} --help."


@pytest.mark.parametrize("flag", ["--targets", "--log"])
def test_list_without_items(flag, tmp_path, capsys):
    assert main(["tune", "--out", str(tmp_path / "run"), flag]) == 2
    assert f"{flag} must have an item; got none." in capsys.readouterr().err
