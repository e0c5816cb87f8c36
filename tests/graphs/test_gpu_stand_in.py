"""The stand-in for a GPU raises a fault where a stream does not wait for another, and none where it waits."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.graphs.gpu_stand_in import stand_in
from tests.graphs.streams import Fault

FAULTS = {
    "written": "stream 1 uses memory before stream 0 has written it",
    "read": "stream 0 writes memory before stream 1 has read it",
    "freed": "stream 0 allocates memory that stream 1 still uses",
}


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("use", FAULTS)
def test_fault_unless_a_stream_waits(use, waits):
    outcome = contextlib.nullcontext() if waits else pytest.raises(Fault, match=FAULTS[use])
    with stand_in(), outcome:
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        x = torch.zeros(4)
        if waits or use != "written":
            side.wait_stream(main)
        with torch.cuda.stream(side):
            x + 1
        if waits:
            main.wait_stream(side)
        if use == "freed":
            del x
            torch.zeros(4)
        else:
            x.zero_()
