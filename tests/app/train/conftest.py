"""Shorter runs."""

from __future__ import annotations

import pytest

from tests.app.runs import shortened


@pytest.fixture(scope="module", autouse=True)
def short_runs(run):
    """Shorten the runs of a module; the shared run is made before."""
    with shortened():
        yield
