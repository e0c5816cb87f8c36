"""Help: all settings, on a screen or two."""

from __future__ import annotations

import re

import pytest

from skipkernels.app.cli.main import COMMANDS, main
from skipkernels.app.cli.options import SETTINGS


def test_help_has_all_settings_and_shows_no_none(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--help-all"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert [name for name in SETTINGS if f"--{name.replace('_', '-')}" not in out] == []
    assert "None" not in out and "--root PATH" in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_or_two(capsys, monkeypatch, command):
    """At most 90 lines; settings that are hidden are in --help-all, which the last line names."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([*command.split(), option])
        shown[option] = capsys.readouterr().out
    found = {option: set(re.findall("^.{2,3}(--[a-z][a-z-]*)", text, re.MULTILINE)) for option, text in shown.items()}
    assert len(shown["--help"].splitlines()) <= 90
    hint = f"More options: skipkernels {command} --help-all\n"
    assert found["--help"] <= found["--help-all"] and "--help-all" not in shown["--help-all"]
    assert (found["--help"] < found["--help-all"]) == shown["--help"].endswith(hint)
    if command == "tune":
        basic = {"--data", "--shots", "--model", "--pretrained", "--method", "--head", "--blend", "--epochs", "--out"}
        assert found["--help"] == basic | {"--overwrite", "--resume", "--config", "--print-config"}
