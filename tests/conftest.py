"""What all tests share: reproducible hypothesis runs, and threads as they were."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# No deadline: two busy cores. The same examples each time: a failure is everybody's failure.
hypothesis.settings.register_profile("skipkernels", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("skipkernels")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
