"""Help and version: quick, without torch, and whole."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import skipkernels
from skipkernels.app.cli.main import COMMANDS, main
from skipkernels.app.cli.options import SETTINGS

# CPU seconds of the whole process. Measured 0.15 to 0.35 s; importing torch and open_clip takes 5 s. The bound leaves a
# factor of three for slow machines and still fails if a heavy module is imported.
MOST_SECONDS = 1.0


def measured(*arguments: str) -> tuple[str, float, set[str]]:
    """Standard output, CPU seconds and imported modules of the program, which must succeed."""
    code = (
        "import resource, sys\n"
        "from skipkernels.__main__ import main\n"
        f"sys.argv = ['skipkernels', *{list(arguments)!r}]\n"
        "try: code = main()\n"
        "except SystemExit as ended: code = ended.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime, *sys.modules, file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *modules = done.stderr.split()
    return done.stdout, float(seconds), set(modules)


def test_help_is_quick():
    out, seconds, modules = measured("tune", "--help")
    assert out.startswith("usage: skipkernels tune")
    assert not {"torch", "open_clip", "matplotlib", "numpy"} & modules
    assert seconds < MOST_SECONDS


def test_version_is_quick():
    out, seconds, modules = measured("--version")
    assert out == f"skipkernels {skipkernels.__version__}\n"
    assert "torch" not in modules and seconds < MOST_SECONDS


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
