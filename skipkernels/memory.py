"""Memory of a device, or of the process: how much is free, and how much was held at the peak."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the high-water mark of resident memory
_STATUS = Path("/proc/self/status")
_INFO = Path("/proc/meminfo")  # Linux


def free_bytes(device: torch.device) -> float:
    """What is free on a device, memory that PyTorch holds and does not use included; infinity where nobody says."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if not _INFO.exists():
        return float("inf")
    with _INFO.open() as lines:  # asked at each step: no further than to the third line
        available = next((line for line in lines if line.startswith("MemAvailable")), "MemAvailable: 0 kB")
    return int(available.split()[1]) * 1024


def out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch raised an error because too little memory is free."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error).partition("\n")[0]


class PeakMemory:
    """High-water mark since `reset`, in bytes.

    On a GPU, `torch.cuda.max_memory_allocated`. On Linux, resident memory of the process. Elsewhere the mark cannot be
    reset and stands since the process began.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Begin again from what is held now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            try:
                _CLEAR.write_text("5")
            except OSError:
                return  # not permitted here: the mark stands since the process began

    def read(self) -> int:
        """The mark, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if _STATUS.exists():
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
