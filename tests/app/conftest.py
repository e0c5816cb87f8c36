"""The optimizer of all runs, and a run that tests share."""

from __future__ import annotations

import pytest

from skipkernels.app.train import tune
from tests.app.runs import published_optimizer, small


@pytest.fixture(scope="session", autouse=True)
def published():
    with published_optimizer():
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory, published):
    """Run folder, which no test changes, and metrics."""
    folder = tmp_path_factory.mktemp("run")
    return folder, tune(small(folder))
