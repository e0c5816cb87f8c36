"""Metrics, predictions and pages of a run, for tests."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import torch
from PIL import Image

from skipkernels.app.config import TuneConfig
from skipkernels.app.report.run_page import report_html
from skipkernels.app.results.predictions import TestPredictions, TopClasses
from skipkernels.app.results.thumbnails import thumbnail
from tests.app.report.parsed import Page

NASTY = """</b></script><script>alert("1")</script> & 'quotes' {braces} {{ 7 * 7 }} {0} %s $x$ é 字 <!-- ]]>"""
ENVIRONMENT = {"finished": "2026-11-26T10:00:00+00:00", "versions": {"torch": "2.13.0"}, "machine": "x86_64"}


def metrics(**changes) -> dict:
    accuracy = {"base": 81.5, "new": 40.25, "harmonic": 53.89}
    cost = {"device": "cpu", "seconds_total": 1234.5, "seconds_per_epoch": 1.25, "milliseconds_per_step": 25.125}
    cost |= {"baseline_memory_mib": 500.0, "peak_memory_mib": 735.4}
    return {
        "status": "complete",
        "method": "skip",
        "head": "none",
        "classifier": "Skip Tuning",
        "protocol": "base-to-new",
        "classes": {"base": 20, "new": 19},
        "zero_shot": {"base": 57.5, "new": 47.92, "harmonic": 52.27},
        "tuned": accuracy,
        "epochs": 2,
        "steps": 40,
        "kept_classes": 11.5,
        "parameters": {"trained": 847616, "all": 6427201},
        "cost": cost,
        "command": "skipkernels tune --shots 4",
        "environment": ENVIRONMENT,
        "images": {"train": 80, "tests": {"base": 24}},
        "checkpoint": {"file": "model.safetensors", "mib": 24.5},
        **dict.fromkeys(("candidates", "chosen_because", "validation", "best_epoch")),
        **{name: {} for name in ("by_class", "zero_shot_by_class")},
        "notes": [],
    } | changes


def row(epoch: int, **changes) -> dict:
    return {
        "epoch": epoch,
        "loss": 1 / epoch,
        "accuracy": {"base": 60.0 + epoch, "new": 40.0, "harmonic": 48.0},
    } | changes


def image(size=(32, 32), mode="RGB", value=0) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode).point(lambda grey: (grey + value) % 256)


def top(*classes: int, share: float = 0.5) -> TopClasses:
    """Predicted classes, each with the following class in second place."""
    first = torch.tensor(classes)
    both = torch.stack([first, first + 1], dim=1)
    return TopClasses(both, torch.tensor([share, 1 - share]).expand(len(first), 2).contiguous())


def predictions_of(labels: list[int], before: list[int], after: list[int]) -> TestPredictions:
    """Predictions of classes before and after tuning."""
    names = [str(label) for label in range(max(*labels, *before, *after) + 1)]
    images = [f"{number}.png" for number in range(len(labels))]
    return TestPredictions("all", names, torch.tensor(labels), top(*before), top(*after), images)


def predicted(name="base", label="alpha") -> TestPredictions:
    """Images of the classes 0 0 1 1: the first is fixed by tuning, the third broken; the second is wrong."""
    tops = top(1, 1, 1, 1), top(0, 1, 2, 1, share=0.875)
    thumbnails = {0: thumbnail(image()), 2: thumbnail(image(value=9))}
    return TestPredictions(
        name, [label, "beta", "gamma", "delta"], torch.tensor([0, 0, 1, 1]), *tops, list("abcd"), thumbnails
    )


def page(changes=None, rows=None, config=None, tests=None, label="alpha") -> str:
    rows = [row(1), row(2)] if rows is None else rows
    tests = [predicted("base", label), predicted("new", label)] if tests is None else tests
    return report_html(
        (config or TuneConfig(method="skip", device="cpu")).resolved(), metrics(**(changes or {})), rows, tests
    )


def assert_complete(text: str) -> None:
    """Check that no nan or None is shown."""
    found = Page(text)
    plots = "".join(ElementTree.tostring(svg, "unicode") for svg in found.root.iter("svg"))
    shown = found.text.partition("All settings")[0] + plots
    assert not re.search(r"\bnan\b|None|\binf\b|NaN", shown)
