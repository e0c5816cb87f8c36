"""Progress in a terminal and in a log; the terminal is restored."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest
import torch
from rich.console import Console

from skipkernels.app.train.progress import ProgressDisplay
from skipkernels.memory import PeakMemory

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"  # the cursor
ZERO_SHOT = {"base": 40.0, "new": 30.0, "harmonic": 34.29}


def console(terminal: bool, **how) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, record=True, width=100, **how)


def row(epoch: int, **accuracy: float | None) -> dict:
    accuracy = accuracy or {"base": 50.0 + epoch, "new": 29.0, "harmonic": 37.0}
    return {"epoch": epoch, "loss": 1 / epoch, "steps": 5, "seconds": 0.1, "accuracy": accuracy}


def run(on: Console, epochs: int = 2, **how) -> None:
    with ProgressDisplay(on, title="letters, [b]skip[/b]", **how) as display:
        advance = display.features(30)
        advance(10)
        advance(20)
        display.begin(epochs=epochs, steps_per_epoch=5, zero_shot=ZERO_SHOT, batch_size=4)
        for epoch in range(epochs):
            for _ in range(5):
                display.step()
            display.loss(0.5)
            display.epoch(row(epoch + 1))


def lines(on: Console) -> list[str]:
    return on.export_text(clear=False).splitlines()


def squeezed(on: Console) -> str:
    return re.sub(" +", " ", on.export_text(clear=False))


# ---- on a terminal -----------------------------------------------------------------------------------------------


def test_display_last_view_stays():
    on = console(terminal=True)
    run(on)
    last = squeezed(on).rpartition("letters, [b]skip[/b]")[2]
    for text in (
        "30 images",
        "epoch 2 of 2",
        "loss 0.5000",
        "images/s",
        "base 40.00 52.00 +12.00",
        "new 30.00 29.00 -1.00",
    ):
        assert text in last, text
    assert "left" not in last, "no time left at the end"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, FloatingPointError])
def test_display_restores_terminal(error):
    on, before = console(terminal=True), (sys.stdout, sys.stderr)
    try:
        with ProgressDisplay(on, title="letters") as display:
            display.begin(epochs=2, steps_per_epoch=5, zero_shot=ZERO_SHOT, batch_size=4)
            assert sys.stdout is not before[0], "prints go above the view"
            display.step()
            if error is not None:
                raise error
    except (KeyboardInterrupt, FloatingPointError):
        pass
    written = on.file.getvalue()
    assert written.count(HIDE) == 1 and written.endswith(SHOW)
    assert (sys.stdout, sys.stderr) == before
    assert display._live._refresh_thread is None, "no thread draws"


def test_display_resumed_run_starts_at_its_epoch():
    on = console(terminal=True)
    with ProgressDisplay(on, title="letters") as display:
        display.begin(epochs=4, steps_per_epoch=5, zero_shot=ZERO_SHOT, batch_size=4, done=2)
        time.sleep(0.5)
        for _ in range(5):
            display.step()
        display._live.refresh()
    assert "epoch 3 of 4, test" in squeezed(on)
    assert re.search(r"test 0:00:0[01] 0:00:0[12]\n", squeezed(on)), "steps of this process give the time left"


def test_display_escapes_names_and_shows_dashes():
    on = console(terminal=True)
    with ProgressDisplay(on, title="[red]letters[/red]") as display:
        display.begin(epochs=1, steps_per_epoch=1, zero_shot={"[b]a[/b]": 40.0, "new": 30.0}, batch_size=4)
        display.epoch(row(1, **{"[b]a[/b]": 50.0, "new": None}))
    assert "[red]letters[/red]" in squeezed(on)
    assert "[b]a[/b] 40.00 50.00 +10.00" in squeezed(on) and "new 30.00 - \n" in squeezed(on)


def test_display_features_add_up():
    on = console(terminal=True)
    with ProgressDisplay(on, title="letters") as display:
        display.features(30)(30)
        display.features(12)  # all from a store: no advance
        display._live.refresh()
        assert "30 images" in squeezed(on)
        display.begin(epochs=1, steps_per_epoch=1, zero_shot=ZERO_SHOT, batch_size=4)
    assert "42 images" in squeezed(on)


@pytest.mark.parametrize("width", [20, 40, 300])
def test_display_any_width(width):
    on = Console(file=io.StringIO(), force_terminal=True, record=True, width=width, height=8)
    run(on)
    assert max(map(len, lines(on))) <= width


# ---- in a log ----------------------------------------------------------------------------------------------------


def test_display_log_has_line_per_epoch():
    on = console(terminal=False)
    run(on)
    title, features, zero_shot, *epochs = lines(on)
    assert title == "letters, [b]skip[/b]" and features == "features  30 of 30 images  0:00:00"
    assert zero_shot == "zero-shot  base 40.0 %  new 30.0 %  harmonic 34.3 %"
    accuracies = r"base 5\d\.0 % \(\+1\d\.0\)  new 29\.0 % \(-1\.0\)  harmonic 37\.0 % \(\+2\.7\)  [\d,]+ images/s"
    assert re.fullmatch(rf"epoch 1/2  loss 1\.0000  {accuracies}  0:00:00 left", epochs[0])
    assert re.fullmatch(rf"epoch 2/2  loss 0\.5000  {accuracies}", epochs[1]) and len(epochs) == 2
    assert "\x1b" not in on.file.getvalue()


def test_display_shows_peak_memory():
    on = console(terminal=False)
    run(on, memory=PeakMemory(torch.device("cpu")))
    assert re.search(r"  peak memory [\d,]{3,6} MiB$", lines(on)[-1])


def test_display_log_many_tests_shows_first_and_mean():
    on = console(terminal=False)
    names = ["source", *(f"target-{place}" for place in range(10)), "targets"]
    with ProgressDisplay(on, title="letters") as display:
        display.begin(epochs=1, steps_per_epoch=1, zero_shot=dict.fromkeys(names, 40.0), batch_size=4)
        display.epoch(row(1, **dict.fromkeys(names, 41.0)))
    assert lines(on)[1:] == [
        "zero-shot  source 40.0 %  targets 40.0 %",
        "epoch 1/1  loss 1.0000  source 41.0 % (+1.0)  targets 41.0 % (+1.0)  200 images/s",
    ]


def test_display_log_without_loss_and_accuracy():
    on = console(terminal=False)
    with ProgressDisplay(on, title="letters") as display:
        display.begin(epochs=0, steps_per_epoch=0, zero_shot=ZERO_SHOT, batch_size=4)
        display.epoch({"epoch": 1, "loss": None, "accuracy": {"base": 50.0, "new": None}})
    assert lines(on)[-1] == "epoch 1/0  base 50.0 % (+10.0)"


def test_display_log_does_not_wrap():
    on = Console(file=io.StringIO(), force_terminal=False, record=True, width=20)
    run(on)
    assert len(lines(on)) == 5


def test_display_log_reports_slow_features(monkeypatch):
    monkeypatch.setattr("skipkernels.app.train.progress._LOG_SECONDS", 0.05)
    on = console(terminal=False)
    with ProgressDisplay(on, title="letters") as display:
        advance = display.features(100)
        advance(1)
        time.sleep(0.06)
        advance(1)
        advance(1)
    assert lines(on) == ["letters", "features  2 of 100 images  0:00:00"]


def test_display_quiet_console_shows_nothing():
    on = console(terminal=True, quiet=True)
    before = threading.active_count()
    with ProgressDisplay(on, title="letters") as display:
        display.begin(epochs=1, steps_per_epoch=1, zero_shot=ZERO_SHOT, batch_size=4)
        display.step()
        display.epoch(row(1))
        assert threading.active_count() == before
    assert on.file.getvalue() == ""


# ---- cost -----------------------------------------------------------------------------------------------


def test_display_step_is_cheap():
    with ProgressDisplay(console(terminal=True), title="letters") as display:
        display.begin(epochs=1, steps_per_epoch=10_000, zero_shot=ZERO_SHOT, batch_size=4)
        best = float("inf")
        for _ in range(10):  # 0.1 µs on an idle machine
            began = time.perf_counter()
            for _ in range(1000):
                display.step()
            best = min(best, time.perf_counter() - began)
    assert best / 1000 < 20e-6


def test_display_smooths_loss():
    on = console(terminal=True)
    with ProgressDisplay(on, title="letters") as display:
        display.begin(epochs=1, steps_per_epoch=3, zero_shot=ZERO_SHOT, batch_size=4)
        for value in (1.0, 0.0):
            display.loss(value)
    assert "loss 0.8000" in squeezed(on)
