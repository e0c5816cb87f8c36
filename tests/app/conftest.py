"""The optimizer of all runs, no comparison when a SkipCLIP is made, and a run that tests share."""

from __future__ import annotations

import pytest

from skipkernels.app.train import tune
from tests.app.runs import published_optimizer, small
from tests.models import uncompared, verify

_check = verify._check


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """Train with the published optimizer, and do not compare a new SkipCLIP with its model."""
    with published_optimizer(), uncompared():
        yield


@pytest.fixture
def compared(monkeypatch):
    """Compare a new SkipCLIP with its model, as outside tests."""
    monkeypatch.setattr(verify, "_check", _check)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run folder, which no test changes, and metrics."""
    folder = tmp_path_factory.mktemp("run")
    with published_optimizer():
        return folder, tune(small(folder))
