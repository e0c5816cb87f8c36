"""Commands and options in the documentation: their programs parse them, and do not run.

Commands are in plain, `console`, `sh` and indented blocks, and in backticks, where a leading "…" is the module of the
previous command, and arguments may be omitted.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import runpy
import shlex
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from skipkernels.app.cli import main as cli
from skipkernels.app.cli.options import tune_config
from tests.pages import ROOT, Block, Page, each_page

# Placeholders in commands, and a value for each.
PLACEHOLDERS = {"NAME": "mlp_activation"}
# Programs with arguments that are not checked.
OTHER_PROGRAMS = ("cd", "curl", "docker", "git", "pip", "torchrun")


class Command(NamedTuple):
    """Words of a command line; `mention` is True in running text, where arguments may be omitted."""

    words: tuple[str, ...]
    mention: bool


def commands(page: Page) -> list[Command]:
    """The commands of known programs, each once."""
    lines = [(line, False) for block in page.blocks for line in _lines_of_block(block)]
    lines += [(line, False) for line in re.findall(r"^ {4,}(\S.*)$", page.prose, re.MULTILINE)]
    module = ""  # of the previous command
    for span in page.spans:
        if found := re.match(r"python -m [\w.]+", span):
            module = found.group()
        lines.append((span.replace("…", module, 1) if span.startswith("… ") else span, True))
    found = [Command(_words(part), mention) for line, mention in lines for part in _parts(line)]
    return [command for command in dict.fromkeys(found) if command.words]


def _lines_of_block(block: Block) -> list[str]:
    """Command lines of a block: lines that start with "$", if any, else all lines."""
    if block.kind not in ("", "console", "sh"):
        return []
    text = block.text.replace("\\\n", " ")  # a command on several lines
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    lines = [line for line in lines if line.startswith("$ ")] or lines
    programs = {part.partition(" ")[0] for line in lines for part in _parts(line)}
    if block.kind == "" and not programs & {*CHECKS}:
        return []  # not commands, for example a file tree
    unknown = programs - {*CHECKS, *OTHER_PROGRAMS}
    assert not unknown, f"line {block.line}: unknown program {', '.join(unknown)}"
    return lines


def _parts(line: str) -> list[str]:
    """Commands of a line, without the variables that are set before them."""
    return [re.sub(r"^(\$ )?([A-Z_]+=\S+ )*", "", part.strip()) for part in line.split(" && ")]


def _words(command: str) -> tuple[str, ...]:
    """Words of a command of a known program up to a redirection; none of others."""
    if command.partition(" ")[0] not in CHECKS:
        return ()
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True) if word != "…"]
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "compute-sanitizer":  # runs a program, if one is named
        return tuple(words[words.index("python") :]) if "python" in words else ()
    return tuple(words)


# ---- programs --------------------------------------------------------------------------------------------------------


def check_skipkernels(arguments: tuple[str, ...], mention: bool) -> None:
    try:
        run(cli.main, list(arguments))
    except AssertionError as error:
        if not (mention and re.search("Missing (from|subcommand|value)", str(error))):
            raise


def check_python(arguments: tuple[str, ...], mention: bool) -> None:
    if arguments[:2] == ("-m", "pytest"):
        return check_pytest(arguments[2:], mention)
    if arguments[0] == "-m":
        found = importlib.util.find_spec(arguments[1])
        assert found is not None, f"no module {arguments[1]}"
        name = arguments[1] if found.submodule_search_locations is None else f"{arguments[1]}.__main__"
        main, rest = importlib.import_module(name).main, arguments[2:]
    else:
        main, rest = runpy.run_path(str(ROOT / arguments[0]))["main"], arguments[1:]
    if mention and not rest:
        rest = ("--help",)

    def parse(parser: argparse.ArgumentParser, *_: Any) -> typing.NoReturn:
        unknown = parser.parse_known_args(rest)[1]
        assert not unknown, f"{' '.join(unknown)}: no such option"
        raise SystemExit(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        run(main)


def check_pytest(arguments: tuple[str, ...], mention: bool) -> None:
    for path in (word for word in arguments if re.match(r"\w+/", word)):
        assert (ROOT / path).exists(), f"there is no {path}"


def check_make(arguments: tuple[str, ...], mention: bool) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        there = rf"^{re.escape(name)} *\??:?=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(there, makefile, re.MULTILINE), f"make {word}: the Makefile has no {name}"


CHECKS: dict[str, Callable[[tuple[str, ...], bool], None]] = {
    "skipkernels": check_skipkernels,
    "python": check_python,
    "pytest": check_pytest,
    "make": check_make,
    "compute-sanitizer": check_python,
}


def run(main: Callable[..., int | None], *arguments: Any) -> None:
    """Run a main function; its output is the message if it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main(*arguments) or 0
    except SystemExit as ended:
        code = ended.code or 0
    assert code == 0, said.getvalue()


@pytest.fixture
def nothing_runs(monkeypatch) -> None:
    """Parse commands without running them; check the settings of tune."""

    def resolve(command: cli.TuneCommand, *_: Any) -> int:
        tune_config(command).resolved()
        return 0

    for command in cli.COMMANDS.values():
        monkeypatch.setattr(command, "execute", lambda *_: 0)
    monkeypatch.setattr(cli.TuneCommand, "execute", resolve)
    monkeypatch.setattr(cli, "command_with_file", lambda *_: cli.TuneCommand())  # the file of --config


@each_page
def test_programs_parse_the_commands(page, nothing_runs):
    wrong = []
    for command in commands(page):
        try:
            CHECKS[command.words[0]](command.words[1:], command.mention)
        except (AssertionError, argparse.ArgumentError) as error:
            wrong.append(f"{' '.join(command.words)}: {error}")
    assert not wrong, "\n".join(wrong)


@functools.cache
def options() -> set[str]:
    """Options of all programs: fields of the commands' dataclasses, and options of argparse."""
    found: set[str] = set()
    for file in (ROOT / "skipkernels" / "app").rglob("*.py"):
        fields = [name.replace("_", "-") for name in re.findall(r"^    (\w+): ", file.read_text(), re.MULTILINE)]
        found |= {f"--{no}{name}" for name in fields for no in ("", "no-")}
    for file in (path for folder in ("bench", "recipes", "examples") for path in (ROOT / folder).rglob("*.py")):
        found |= set(re.findall(r'"(--[a-z-]+)"', file.read_text()))
    return found


@each_page
def test_options_exist(page):
    words = [word for span in page.spans if span.startswith("--") for word in span.split() if word.startswith("--")]
    assert not [word for word in words if word not in options()], "no program has these options"
