"""A run that many tests share, and shorter runs."""

from __future__ import annotations

import functools

import open_clip
import pytest

from skipkernels.tuner import forward_profile, plots, tune
from tests.tuner.runs import small


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run folder, which no test changes, and metrics."""
    folder = tmp_path_factory.mktemp("run")
    return folder, tune(small(folder))


_get_tokenizer = functools.cache(open_clip.get_tokenizer)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Leave out a tenth of a small run, which has tests of its own: plots, and the rounds of a timing but one.

    The tokenizer is made once.
    """
    monkeypatch.setattr(forward_profile, "_ROUNDS", 1)
    monkeypatch.setattr(plots, "panels_svg", lambda name, label, panels, **_: f"<svg>{name}</svg>")
    monkeypatch.setattr(open_clip, "get_tokenizer", _get_tokenizer)
