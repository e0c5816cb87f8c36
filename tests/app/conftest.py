"""A run that tests share."""

from __future__ import annotations

import pytest

from skipkernels.app.train import tune
from tests.app.runs import small


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run folder, which no test changes, and metrics."""
    folder = tmp_path_factory.mktemp("run")
    return folder, tune(small(folder))
