"""Help: all settings, on a screen or two."""

from __future__ import annotations

import re

import pytest

from skipkernels.app.cli.main import COMMANDS, main
from skipkernels.app.cli.options import SETTINGS
from skipkernels.published import RATES


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


def test_help_names_the_defaults_of_skip(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    out = shown(capsys, "tune --help-all")
    new, few, other = (RATES[protocol] for protocol in ("base-to-new", "few-shot", "cross-dataset"))
    assert new.epochs == other.epochs and few.text_lr == other.text_lr
    text, image = (f"{new.text_lr:.0e}", f"{few.text_lr:.0e}"), (f"{rates.image_lr:.0e}" for rates in (new, few, other))
    assert f"For skip {new.epochs}, with few-shot {few.epochs}; for" in out
    assert "For skip {} with base-to-new, else {}; for".format(*text).replace("e-0", "e-") in out
    assert "For skip {} with base-to-new, {} with few-shot, else {}; for".format(*image).replace("e-0", "e-") in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_or_two(capsys, monkeypatch, command):
    """At most 90 lines; settings that are hidden are in --help-all, which the last line names."""
    monkeypatch.setenv("COLUMNS", "80")
    some, every = (shown(capsys, f"{command} {option}") for option in ("--help", "--help-all"))
    assert len(some.splitlines()) <= 90 and "--help-all" not in every
    hint = f"More options: skipkernels {command} --help-all\n"
    assert options(some) <= options(every) and (options(some) < options(every)) == some.endswith(hint)
