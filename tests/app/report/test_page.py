"""The page of a run in a browser: self-contained, without code in names, and with readable colours."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess

import pytest

from skipkernels.app.config import TuneConfig
from tests.app.report.pages import ENVIRONMENT, NASTY, page, predicted, row
from tests.app.report.parsed import Page, text_of


def test_page_is_self_contained():
    found = Page(page(label=NASTY + "caf\udce9").encode().decode())  # a folder name that is not UTF-8
    for element in found.root.iter():
        assert element.tag not in ("link", "iframe", "object", "base", "form")
        for name in ("src", "href", "xlink:href"):
            assert element.get(name, "#").startswith(("#", "data:image/")), (element.tag, element.attrib)
        assert not any(name.startswith("on") for name in element.attrib)
    text = page()
    assert "@import" not in text and set(re.findall(r"url\((.)", text)) <= {"#"}


def test_page_escapes_names():
    """The only script is the page's own, and the page names its digest."""
    parts = {"accuracy": {NASTY: 60.0}}
    accuracy = {"zero_shot": {NASTY: 57.5}, "tuned": {NASTY: 60.0}, "classes": {NASTY: 20}, "protocol": NASTY}
    given = {
        "notes": [NASTY],
        "command": NASTY,
        "environment": ENVIRONMENT | {"machine": NASTY, "versions": {NASTY: NASTY}},
    }
    blend = {"alphas": [0.0, 1.0], "accuracy": {NASTY: [1.0, 2.0]}, "chosen": 1.0}
    tests = [predicted(NASTY, NASTY)]
    text = page(accuracy | given | {"blend": blend}, [row(1, **parts)], TuneConfig(data=NASTY, method="skip"), tests)
    found = Page(text)
    (script,) = found.root.iter("script")
    assert NASTY not in text
    assert {image.get("alt") for image in found.root.iter("img")} == {NASTY, "beta"}
    # title twice, headline, note, tables, legends, …: all as text
    assert found.text.count(NASTY) > 15
    policy = found.root.find(".//meta[@http-equiv]").get("content")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        colour = "#" + "".join(2 * digit for digit in colour[1:]) if len(colour) == 4 else colour
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one) + 0.05, luminance(other) + 0.05))
    return light / dark


def test_colours_have_contrast():
    schemes = [
        dict(re.findall(r"--(\w+): (#\w+);", rule)) for rule in re.findall(r":root \{(.*?)\}", page(), re.DOTALL)
    ]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys(), "light and dark"
    for colours in schemes:
        for name in ("ink", "quiet", "better", "worse", "accent"):  # of text
            for background in ("page", "soft"):
                assert contrast(colours[name], colours[background]) >= 4.5, (name, background)
        assert contrast(colours["zero"], colours["page"]) >= 3
    assert "color-scheme: light dark" in page()


def browsed(path, address: str) -> tuple[str, str]:
    """Page as a browser shows it, and what it logs."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed; the page is parsed by the other tests")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={path / 'browser'}"]
    command += ["--enable-logging=stderr", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_page_in_a_browser(tmp_path):
    """Names inject nothing, the page's own script runs, and the search of the address filters the table."""
    (tmp_path / "report.html").write_text(page(label=NASTY, tests=[predicted(label=NASTY)]))
    shown, logged = browsed(tmp_path, f"{(tmp_path / 'report.html').as_uri()}#q=GAMM")
    assert logged == "", logged
    classes = Page(shown).section("classes")
    rows = {text_of(row[0]): "hidden" in row.attrib for row in classes.findall(".//tbody/tr")}
    assert rows == {NASTY: True, "beta": False}
    assert text_of(classes.find(".//output")) == "1 of 2" and classes.find(".//thead//button") is not None
