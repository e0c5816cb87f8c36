"""Terminal output: literal strings, limited encodings, and streams that fail or close."""

from __future__ import annotations

import errno
import io
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from skipkernels.app.cli.main import main
from skipkernels.app.console import Terminal, plain
from tests.failures import Broken

HOSTILE = "[/b]:ok:\x1b[2Jé\udc80"
SHOWN = r"[/b]:ok:\x1b[2Jé\udc80"


def terminal(**options) -> Terminal:
    return Terminal(io.StringIO(), width=60, **options)


def written(on: Console) -> str:
    return on.file.getvalue()  # type: ignore[attr-defined]


# ---- strings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", [False, True])
def test_terminal_shows_strings_literally(color):
    on = terminal(force_terminal=color)
    on.print(plain(HOSTILE))
    table = Table("[/b]\x07", title=HOSTILE)
    table.add_row(HOSTILE)
    on.print(HOSTILE)
    on.print(table)
    assert written(on).count(SHOWN) == 4 and r"[/b]\x07" in written(on)
    assert "\x1b[2J" not in written(on) and "\x07" not in written(on)


def test_cli_errors_show_paths_literally(tmp_path, capsys):
    assert main(["eval", f"{tmp_path}/[/b]:ok:\x1b[2J"]) == 2
    assert r"/[/b]:ok:\x1b[2J" in capsys.readouterr().err.replace("\n", "")


# ---- encodings -----------------------------------------------------------------------------------------------------


def test_cli_escapes_what_the_encoding_lacks(monkeypatch):
    """Rich draws tables in ASCII; other characters are escaped."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    code = "import skipkernels.app.cli.main as m; from skipkernels.__main__ import main; from rich.table import Table\n"
    code += "m.main = lambda: m.Terminal(m.sys.stdout).print(Table('1 × 2'))\nmain()"
    assert "| 1 \\xd7 2 |\n|---" in shell("", code).stdout


# ---- streams that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "number", "code"),
    [("stdout", errno.ENOSPC, 1), ("stdout", errno.EPIPE, 0), ("stderr", errno.EPIPE, 0)],
    ids=["full", "unread", "errors"],
)
def test_cli_exit_code_if_results_cannot_be_printed(monkeypatch, capsys, stream, number, code):
    monkeypatch.setattr(sys, stream, Broken(number))
    assert main(["doctor"]) == code
    error = capsys.readouterr().err
    assert error == ("failed stdout can't be written: [Errno 28] No space left on device; result files are "
                     "complete\n" if code else "")  # fmt: skip


def test_cli_failed_command_does_not_call_its_results_complete(monkeypatch, capsys, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "damaged.png").touch()
    monkeypatch.setattr(sys, "stdout", Broken(errno.ENOSPC))
    assert main(["check", f"imagefolder:{tmp_path}"]) == 1
    assert capsys.readouterr().err.endswith("stdout can't be written: [Errno 28] No space left on device\n")


def shell(command: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process without torch, with streams redirected by `command`."""
    python = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {command}', sys.executable, code]
    return subprocess.run(python, capture_output=True, text=True)


def test_cli_broken_pipe_is_silent():
    done = shell("--help | true", "from skipkernels.__main__ import main; main()")
    assert (done.returncode, done.stderr) == (0, "")


def test_cli_runs_with_closed_streams(tmp_path):
    """A file that is opened later does not get the descriptor of a stream, into which libraries may write."""
    code = "import sys; sys.argv[1:] = ['check', 'pictograms:food']\n"
    code += "from skipkernels.__main__ import main; code = main()\n"
    code += f"with open({str(tmp_path / 'found')!r}, 'w') as file: file.write(str(file.fileno() + 10 * code))"
    assert shell("<&- >&- 2>&-", code).returncode == 0
    assert 2 < int((tmp_path / "found").read_text()) < 10
