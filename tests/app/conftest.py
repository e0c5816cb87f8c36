"""The optimizer of all runs, no comparison when a SkipCLIP is made, and a run that tests share."""

from __future__ import annotations

import pytest

from skipkernels.app.train import tune
from tests.app.runs import published_optimizer, small
from tests.models import uncompared, verify

_check = verify._check


@pytest.fixture(scope="session")
def as_published():
    """The context in which the runs of a session are trained."""
    return published_optimizer


@pytest.fixture(scope="module", autouse=True)  # tests elsewhere run with the optimizer of users
def published(as_published):
    with as_published():
        yield


@pytest.fixture(scope="module", autouse=True)
def not_compared(published):
    with uncompared():
        yield


@pytest.fixture
def compared(monkeypatch):
    """Compare a new SkipCLIP with its model, as outside tests."""
    monkeypatch.setattr(verify, "_check", _check)


@pytest.fixture(scope="session")
def run(tmp_path_factory, as_published):
    """Run folder, which no test changes, and metrics."""
    folder = tmp_path_factory.mktemp("run")
    with as_published():
        return folder, tune(small(folder))
