"""Fixtures: one thread, as on tensors this small a second one costs more time than it saves, and a backend."""

from __future__ import annotations

import pytest
import torch

from tests.ops.conftest import backend  # noqa: F401


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
