"""report.html in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.app.report.pages import (
    NASTY,
    page,
    predicted,
)


def browsed(path, address: str) -> tuple[str, str]:
    """Page as a browser shows it, and what it logs."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed; the page is parsed by the other tests")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path / 'browser'}"]
    command += ["--enable-logging=stderr", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_report_in_a_browser(tmp_path):
    """Names inject nothing, the page's own script runs, and the search of the address filters the table."""
    (tmp_path / "report.html").write_text(page(label=NASTY, tests=[predicted(label=NASTY)]))
    shown, logged = browsed(tmp_path, f"{(tmp_path / 'report.html').as_uri()}#q=GAMM")
    assert logged == "", logged
    rows = re.findall(
        r'<tr( hidden="")?><th scope="row">([^<]*)', shown.partition('id="classes"')[2].partition("</section>")[0]
    )
    assert [(name[:4], bool(hidden)) for hidden, name in rows] == [("&lt;", True), ("beta", False)]
    assert "1 of 2</output>" in shown and "<button" in shown.partition("<thead>")[2]
