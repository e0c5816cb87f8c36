"""An operator that finds no memory says so, in words that the command line knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from skipkernels import _build
from skipkernels import functional as F

MIB = 1 << 20
# Tensors of 128 MiB and more; the first argument is a matrix of [8, 4Mi] numbers in fp32.
CALLS: dict[str, Callable[[Tensor], object]] = {
    "result like an argument": F.mlp_activation,
    "result": lambda rows: F.class_sampled_logits(rows.view(-1, 1)[:8192], rows.view(-1, 1)[:8192], 1.0),
    "contiguous copy": lambda rows: F.mlp_activation(rows.T),
    "tile of a task": lambda rows: F.class_scores(rows, rows, torch.arange(8)),
}


@pytest.fixture
def nearly_no_memory() -> Iterator[Callable[[], None]]:
    """Bounds the address space to a little more than there is; until the end of the test."""
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_AS)

    def bound() -> None:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 16 * MIB, before[1]))

    yield bound
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of the process is read from /proc")
@pytest.mark.parametrize("what", CALLS)
def test_out_of_memory_is_an_error(what, nearly_no_memory):
    _build.load()
    rows = torch.zeros(8, 4 * MIB)
    small = torch.ones(8, 2)
    F.mlp_activation(small), F.class_scores(small, small, torch.arange(8)), F.class_sampled_logits(small, small, 1.0)
    nearly_no_memory()
    with pytest.raises((RuntimeError, MemoryError), match="allocate memory|std::bad_alloc"):
        CALLS[what](rows)
