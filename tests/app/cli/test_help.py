"""Help: all settings, on a screen or two."""

from __future__ import annotations

import re

import pytest

from skipkernels.app.cli.main import COMMANDS, main
from skipkernels.app.cli.options import SETTINGS


def shown(capsys, arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 0
    return capsys.readouterr().out


def options(text: str) -> set[str]:
    return set(re.findall("^.{2,3}(--[a-z][a-z-]*)", text, re.MULTILINE))


def test_help_has_all_settings_and_shows_no_none(capsys):
    out = shown(capsys, "tune --help-all")
    assert [name for name in SETTINGS if f"--{name.replace('_', '-')}" not in out] == []
    assert "None" not in out and "--root PATH" in out


def test_help_of_tune_has_the_basic_options(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    basic = {"--data", "--shots", "--model", "--pretrained", "--method", "--head", "--blend", "--epochs", "--out"}
    found = options(shown(capsys, "tune --help"))
    assert found == basic | {"--overwrite", "--resume", "--config", "--print-config"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_or_two(capsys, monkeypatch, command):
    """At most 90 lines; settings that are hidden are in --help-all, which the last line names."""
    monkeypatch.setenv("COLUMNS", "80")
    some, every = (shown(capsys, f"{command} {option}") for option in ("--help", "--help-all"))
    assert len(some.splitlines()) <= 90 and "--help-all" not in every
    hint = f"More options: skipkernels {command} --help-all\n"
    assert options(some) <= options(every) and (options(some) < options(every)) == some.endswith(hint)
