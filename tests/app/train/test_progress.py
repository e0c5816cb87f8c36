"""A line per epoch, and progress bars in a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from skipkernels.app.train.progress import ProgressDisplay

ZERO_SHOT = {"base": 40.0, "new": 30.0, "harmonic": 34.29}
TITLE = "letters, [b]skip[/b]"


def console(terminal: bool, **how) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, record=True, **{"width": 100} | how)


def row(epoch: int) -> dict:
    accuracy = {"base": 50.0 + epoch, "new": 29.0, "harmonic": 37.0}
    return {"epoch": epoch, "loss": 1 / epoch, "steps": 5, "seconds": 0.1, "accuracy": accuracy}


def shown(on: Console) -> list[str]:
    """Lines of a run of two epochs."""
    with ProgressDisplay(on, title=TITLE) as display:
        with display.features(30) as advance:
            advance(10)
        display.begin(epochs=2, steps_per_epoch=5, zero_shot=ZERO_SHOT)
        for epoch in range(2):
            for _ in range(5):
                display.step()
            for value in (1.0, 0.0):
                display.loss(value)
            display.epoch(row(epoch + 1))
    return on.export_text(clear=False).splitlines()


@pytest.mark.parametrize("width", [20, 100])
def test_display_log_has_line_per_epoch(width):
    on = console(terminal=False, width=width)
    title, zero_shot, *epochs = shown(on)
    assert title == TITLE and zero_shot == "zero-shot  base 40.0 %  new 30.0 %  harmonic 34.3 %"
    others = "new 29.0 % (-1.0)  harmonic 37.0 % (+2.7)"
    assert epochs == [
        f"epoch 1/2  loss 1.0000  base 51.0 % (+11.0)  {others}",
        f"epoch 2/2  loss 0.5000  base 52.0 % (+12.0)  {others}",
    ]
    assert "\x1b" not in on.file.getvalue()


def test_display_terminal_has_the_same_lines_above_bars():
    shown(on := console(terminal=True))
    written = re.sub(r"\x1b\[[?\d;]*\w", "", on.file.getvalue())
    assert all(line in written for line in shown(console(terminal=False)))
    bars = written.rpartition("features")[2]
    assert " 30/30 " in bars and " 10/10 loss 0." in bars


def test_display_completes_features_of_a_store_but_not_interrupted_candidates():
    on = console(terminal=True)
    with ProgressDisplay(on, title="letters") as display:
        with display.features(30):
            pass  # all from the store
        display.candidates(8)()
        display.begin(epochs=4, steps_per_epoch=5, zero_shot=ZERO_SHOT)
    assert " 30/30 " in on.export_text(clear=False) and " 1/8 " in on.export_text()


def test_display_resumed_run_starts_at_its_epoch():
    on = console(terminal=True)
    with ProgressDisplay(on, title="letters") as display:
        display.begin(epochs=4, steps_per_epoch=5, zero_shot=ZERO_SHOT, done=2)
        display.step()
    assert " 11/20 " in on.export_text()
