"""One thread: tensors as small as those of these tests wait longer for a second one than they take."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_threads_as_before):
    torch.set_num_threads(1)
