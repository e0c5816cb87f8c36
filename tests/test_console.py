"""Terminal output: literal strings, limited encodings, and streams that fail."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from skipkernels.app.cli.main import main
from skipkernels.console import Output, Terminal, ignore_write_errors, plain, progress

HOSTILE = "[/b]:ok:\x1b[2Jé\udc80"
SHOWN = r"[/b]:ok:\x1b[2Jé\udc80"


def terminal(**options) -> Terminal:
    return Terminal(io.StringIO(), width=60, **options)


def written(on: Console) -> str:
    return on.file.getvalue()  # type: ignore[attr-defined]


class Broken(io.StringIO):
    """A stream that fails with an error number, such as that of a full disk or of a pipe without reader."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self) -> int:
        raise OSError


# ---- strings -------------------------------------------------------------------------------------------------------


def test_plain_shows_strings_literally():
    on = Console(file=io.StringIO(), width=60)
    on.print(plain(HOSTILE))
    assert written(on) == SHOWN + "\n"


@pytest.mark.parametrize("color", [False, True])
def test_terminal_shows_strings_literally(color):
    on = terminal(force_terminal=color)
    table = Table("[/b]\x07", title=HOSTILE)
    table.add_row(HOSTILE)
    on.print(HOSTILE)
    on.print(table)
    with progress(console=on) as bars:
        bars.add_task(HOSTILE, total=1)
    assert written(on).count(SHOWN) >= 4 and r"[/b]\x07" in written(on)
    assert "\x1b[2J" not in written(on) and "\x07" not in written(on)


@pytest.mark.parametrize("color", [False, True])
def test_terminal_writes_data_as_it_is_to_a_file_only(color):
    on = terminal(force_terminal=color)
    on.write("a\x1b[2J,1\n")
    assert written(on) == ("a\\x1b[2J,1\n" if color else "a\x1b[2J,1\n")


@pytest.mark.parametrize(
    "arguments",
    [["cache", "info"], ["cache", "verify"], ["cache", "prune"], ["eval"]],
    ids=lambda arguments: arguments[-1].strip("-"),
)
def test_cli_errors_show_paths_literally(tmp_path, capsys, arguments):
    assert main([*arguments, f"{tmp_path}/[/b]:ok:\x1b[2J"]) == 2
    assert r"/[/b]:ok:\x1b[2J" in capsys.readouterr().err.replace("\n", "")


# ---- encodings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("errors", ["strict", "backslashreplace"])
def test_output_spells_out_what_ascii_lacks(errors):
    file = io.TextIOWrapper(io.BytesIO(), "ascii", errors)
    on = Terminal(file, width=40)
    table = Table("of")
    table.add_row("1 × 2 ± 3 – é")
    on.print(table)
    assert "1 x 2 +/- 3 - \\xe9" in file.buffer.getvalue().decode("ascii")
    assert "+----" in file.buffer.getvalue().decode("ascii")


# ---- streams that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "unread"), [(errno.EPIPE, True), (errno.ENOSPC, False), (errno.EIO, False)])
def test_output_stops_at_its_first_error(number, unread):
    on = Terminal(Broken(number))
    on.print("one")
    on.print("two")
    assert on.output.error.errno == number and on.output.unread is unread
    on.output.release()


def test_output_closed_stream_and_none():
    file = io.StringIO()
    file.close()
    on = Terminal(file)
    on.print("one")
    assert isinstance(on.output.error, ValueError) and not on.output.unread
    Terminal(None).print("one")


def test_ignore_write_errors_restores_the_console():
    on = Console(file=Broken(errno.ENOSPC))
    with ignore_write_errors(on):
        on.print("one")
    with pytest.raises(OSError, match="No space"):
        on.print("two")
    follows = Console()
    with ignore_write_errors(follows):
        assert isinstance(follows.file, Output)
    assert follows.file is sys.stdout


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


def shell(command: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process without torch, with streams redirected by `command`."""
    python = ["bash", "-c", f'set -o pipefail; "$0" -c "$1" {command}', sys.executable, code]
    return subprocess.run(python, capture_output=True, text=True)


def test_standard_streams_broken_pipe_is_silent():
    code = "from skipkernels.console import standard_streams as s\nwith s(): print('x' * 100_000)"
    done = shell("| true", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_open_closed_streams_reserves_descriptors(tmp_path):
    code = (
        "import sys; from skipkernels.__main__ import _open_closed_streams as o; o(); print(input and 1, flush=True)\n"
        f"with open({str(tmp_path / 'found')!r}, 'w') as file: print(file.fileno(), sys.stderr.fileno(), file=file)"
    )
    assert shell("<&- >&- 2>&-", code).returncode == 0
    file, stderr = map(int, (tmp_path / "found").read_text().split())
    assert file > 2 and stderr == 2
