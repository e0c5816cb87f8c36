"""Peak memory of a device or of the process."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the high-water mark of resident memory
_STATUS = Path("/proc/self/status")  # Linux: VmHWM is that mark; some sandboxes leave it out


class PeakMemory:
    """Peak memory in bytes since `reset`: allocated GPU memory, or resident memory of the process for a CPU.

    The latter can be reset on Linux only; on macOS it is the peak since the process started. On Windows it is not
    measured, and 0.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Reset the peak to the memory in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR_REFS.exists():
            with contextlib.suppress(OSError):  # not permitted, as in some containers: `read` covers the whole process
                _CLEAR_REFS.write_text("5", "utf-8")

    def read(self) -> int:
        """Return the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError):
            if found := re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text("utf-8"), re.M):
                return int(found[1]) * 1024
        if resource is None:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
        return peak if sys.platform == "darwin" else peak * 1024
