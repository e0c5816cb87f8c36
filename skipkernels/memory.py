"""Free memory of a device, and the memory that blocks save for backward."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from .dtypes import autocast_dtype

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
_VM_STAT = "/usr/bin/vm_stat"  # macOS
_AVAILABLE = ("free", "speculative", "inactive")  # pages that macOS gives to a process without swapping


def free_bytes(device: torch.device) -> float:
    """Return the free memory of a device in bytes, infinity if unknown.

    A GPU's includes memory that PyTorch has reserved but not allocated. On Linux, the CPU's is the minimum of the
    machine's available memory and of what is left of each cgroup v2 memory limit of the process, such as a container's.
    On macOS it is the memory that is free or inactive, and that of MPS is the same.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if sys.platform == "darwin" and device.type in ("cpu", "mps"):
        return _free_on_macos()
    if device.type != "cpu":
        return math.inf
    free = _fields(_PROC / "meminfo").get("MemAvailable:", math.inf) * 1024
    path = _read(_PROC / "self/cgroup").rpartition("0::/")[2].strip()  # cgroup v2 is the line "0::/path"
    for group in (_GROUPS / path, *(_GROUPS / path).parents):
        if not group.is_relative_to(_GROUPS):
            break
        limit = _read(group / "memory.max").strip()
        if limit.isdigit():  # else "max", or no such file
            # Page cache, which the kernel frees before an allocation fails
            reclaimable = _fields(group / "memory.stat").get("inactive_file", 0)
            free = min(free, int(limit) - int(_read(group / "memory.current") or 0) + reclaimable)
    return max(free, 0)


class FreeMemory:
    """Decisions by the free memory; those that allow are kept, since asking takes 0.1 ms."""

    def __init__(self) -> None:
        self._allowed: dict[torch.device, float] = {}  # largest number of bytes

    def allows(self, needed: float, device: torch.device) -> bool:
        """Return True if at most half of the free bytes are needed, or were when as many or more were allowed.

        Within a capture, where a driver must not be asked, what no earlier step was allowed is refused.
        """
        captures = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if needed > self._allowed.get(device, 0) and not captures and needed <= free_bytes(device) / 2:
            self._allowed[device] = needed
        return needed <= self._allowed.get(device, 0)


def _free_on_macos() -> float:
    """Return what `vm_stat` reports as free, speculative (read ahead) or inactive (not used lately), in bytes."""
    try:
        text = subprocess.run([_VM_STAT], capture_output=True, check=True, encoding="utf-8").stdout
        page = int(re.findall(r"page size of (\d+) bytes", text)[0])
        return page * sum(int(re.findall(rf"^Pages {name}: +(\d+)", text, re.M)[0]) for name in _AVAILABLE)
    except (OSError, subprocess.CalledProcessError, IndexError):
        return math.inf


def _fields(path: Path) -> dict[str, int]:
    """Read the numbers of a file with a name and a number in each line; {} if it cannot be read."""
    return {name: int(number) for name, number, *_ in map(str.split, _read(path).splitlines())}


def _read(path: Path) -> str:
    """Return the text of a file, "" if it cannot be read."""
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Return True if an error of PyTorch, C++ or Python means that memory is exhausted."""
    message = str(error).partition("\n")[0]
    if isinstance(error, MemoryError):
        return message in ("", "std::bad_alloc")  # those that this package raises have another message
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in message or "bad_alloc" in message


# ---- what blocks save ------------------------------------------------------------------------------------------------

# Values per token that `memory="auto"` counts, in multiples of W. A fused block saves 2 in the dtype of the stream and
# 8 in that of the products (table in `fused/stages.py`), and 3 more with norms of heads: attention reads and saves
# normed copies of query, key and value. SwiGLU with M = 4·W adds 4, which are not counted: half of the free memory is
# left.
STREAM_WIDTHS, PRODUCT_WIDTHS = 2, 8 + 3
OWN_FORWARD_WIDTHS = 20  # saved by PyTorch for a block's own forward: 16, or 20 with QuickGELU


def most_saved_bytes(hidden: Tensor, *, fused: bool) -> int:
    """Bytes that a block over hidden states [..., W] saves for backward at most, with memory="fast" if it is fused."""
    stream = hidden.element_size()
    if not fused:
        return hidden.numel() * OWN_FORWARD_WIDTHS * stream
    autocast = autocast_dtype(hidden.device)
    if autocast is None or hidden.dtype == torch.float64:  # which autocast leaves as it is
        return hidden.numel() * (STREAM_WIDTHS + PRODUCT_WIDTHS) * stream
    casts = 12 * hidden.shape[-1] ** 2  # of the weights: (3 + 1 + 4 + 4) · W²
    return hidden.numel() * STREAM_WIDTHS * stream + (hidden.numel() * PRODUCT_WIDTHS + casts) * autocast.itemsize
