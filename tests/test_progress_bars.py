"""Progress bars of library code on stderr, and streams that fail."""

from __future__ import annotations

import io
import sys

import pytest

from skipkernels._progress import Output, progress
from tests.failures import Broken


@pytest.mark.parametrize("installed", [True, False], ids=["rich", "without"])
def test_progress_shows_bar_if_rich_is_installed(monkeypatch, installed):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    if not installed:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress("[/b]\x1b[2J", 3) as advance:
        advance(1)
        advance(2)
    shown = sys.stderr.getvalue()
    assert (r"[/b]\x1b[2J" in shown and "3/3" in shown) if installed else shown == ""


def test_progress_is_hidden(capsys):
    with progress("images", 3, shown=False) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stream", [Broken(), None], ids=["broken", "none"])
def test_progress_without_terminal_does_not_raise(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("images", 3) as advance:
        advance(3)


def test_output_stops_at_its_first_error():
    broken = Broken()
    on = Output(broken)
    assert on.write("one") == 3
    on.write("two")
    on.writelines(["three"])
    on.flush()
    assert isinstance(on.error, BrokenPipeError) and broken.writes == 1


def test_output_closed_stream():
    file = io.StringIO()
    file.close()
    on = Output(file)
    on.write("one")
    assert isinstance(on.error, ValueError)
