"""No operator keeps memory from call to call."""

from __future__ import annotations

import ctypes

import pytest
import torch

from bench.operators.record import small_call
from skipkernels import functional

CALLS = 1200
# Bytes by which caches of the allocator may change. A leak of 8 bytes per call is 9,600.
NOISE = 8192


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def bytes_in_use() -> int:
    """Allocated bytes in all arenas of glibc."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return info.uordblks + info.hblkhd


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="bytes in use are counted by glibc ≥ 2.33")
@pytest.mark.parametrize("name", functional.__all__)
def test_no_operator_leaks(name):
    torch.set_num_threads(1)
    call = small_call(name)
    inputs = [x.requires_grad_() for x in call.inputs.values()]

    def run(times: int) -> None:
        for _ in range(times):
            total = call.total()
            if inputs:
                torch.autograd.grad(total, inputs)

    run(100)
    grown = []
    for _ in range(3):  # what threads of the process allocate meanwhile is counted too, but not each time
        before = bytes_in_use()
        run(CALLS)
        grown.append(bytes_in_use() - before)
        if grown[-1] < NOISE:
            break
    assert min(grown) < NOISE
