"""The optimizer of all runs, no comparison when a SkipCLIP is made, and a run that tests share."""

from __future__ import annotations

import importlib

import pytest

from skipkernels.app.train import tune
from tests.app.runs import published_optimizer, small


verify = importlib.import_module("skipkernels.clip.verify")  # the package has the function of this name
_compare = verify._compare


@pytest.fixture(scope="session", autouse=True)
def published():
    # The comparison with the packaged model, a tenth of these tests' time, has tests of its own in tests/test_clip*.py.
    with published_optimizer(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "_compare", lambda *arguments: None)
        yield


@pytest.fixture
def compared(monkeypatch):
    """Compare a new SkipCLIP with its model, as outside tests."""
    monkeypatch.setattr(verify, "_compare", _compare)


@pytest.fixture(scope="session")
def run(tmp_path_factory, published):
    """Run folder, which no test changes, and metrics."""
    folder = tmp_path_factory.mktemp("run")
    return folder, tune(small(folder))
