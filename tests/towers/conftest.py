"""Fixture for one thread: on tensors this small a second thread costs more time than it saves."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_restore_threads):
    torch.set_num_threads(1)
