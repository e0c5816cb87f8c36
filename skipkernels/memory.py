"""Free memory and peak memory of a device or of the process."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the high-water mark of resident memory
_STATUS = Path("/proc/self/status")
_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> float:
    """Return the free memory of a device in bytes, infinity if unknown.

    On a GPU, includes memory that PyTorch has reserved and not allocated. On Linux, the minimum of the available memory
    of the machine and of what the limit of each control group (version 2) of the process leaves, as in a container.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = _fields(_PROC / "meminfo").get("MemAvailable:", math.inf) * 1024
    path = _read(_PROC / "self/cgroup").rpartition("0::/")[2].strip()
    for group in (_GROUPS / path, *(_GROUPS / path).parents):
        if not group.is_relative_to(_GROUPS):
            break
        limit = _read(group / "memory.max").strip()
        if limit.isdigit():  # else "max", or no such file
            reclaimable = _fields(group / "memory.stat").get("inactive_file", 0)
            free = min(free, int(limit) - int(_read(group / "memory.current") or 0) + reclaimable)
    return max(free, 0)


def _fields(path: Path) -> dict[str, int]:
    """Read a file with a name and a number in each line."""
    return {name: int(number) for name, number, *_ in map(str.split, _read(path).splitlines())}


def _read(path: Path) -> str:
    """Return the text of a file, "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Return True if an error of PyTorch, C++ or Python means that memory is exhausted."""
    first = str(error).partition("\n")[0]
    if isinstance(error, MemoryError):
        return first in ("", "std::bad_alloc")  # a MemoryError of this package has another message
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in first or "bad_alloc" in first


class PeakMemory:
    """High-water mark since `reset` in bytes: `torch.cuda.max_memory_allocated`, or on Linux the resident memory.

    On other systems the mark cannot be reset and covers the whole process.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Reset the mark to the memory in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            try:
                _CLEAR.write_text("5")
            except OSError:
                return  # not permitted: the mark covers the whole process

    def read(self) -> int:
        """Return the mark in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if _STATUS.exists():
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
