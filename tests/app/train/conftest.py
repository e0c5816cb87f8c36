"""Shorter runs."""

from __future__ import annotations

import pytest

from tests.app.runs import shortened


@pytest.fixture(scope="module", autouse=True)
def short_runs(run):
    """Shorten the runs of a module. The shared run is made before, since its report needs real plots."""
    with shortened():
        yield
