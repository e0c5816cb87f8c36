"""A run that many tests share, and shorter runs."""

from __future__ import annotations

import pytest

from skipkernels.app.train import tune
from tests.app.train.runs import few_test_images, shortened, small


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Run folder, which no test changes, and metrics."""
    folder = tmp_path_factory.mktemp("run")
    with few_test_images():
        return folder, tune(small(folder))


@pytest.fixture(scope="module", autouse=True)
def short_runs(run):
    """Shorten the runs of a module. The shared run is made before, since its report needs real plots."""
    with shortened():
        yield
