"""Free memory and peak memory of a device or of the process."""

from __future__ import annotations

import functools
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

_CLEAR = Path("/proc/self/clear_refs")  # Linux: writing 5 resets the high-water mark of resident memory
_STATUS = Path("/proc/self/status")
_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes "no limit" as a number above this


def free_bytes(device: torch.device) -> float:
    """Return the free memory of a device in bytes, infinity if unknown.

    On a GPU, includes memory that PyTorch has reserved and not allocated. On Linux, the minimum of the memory of the
    machine, of each control group (the limit of a container), and of RLIMIT_AS.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    free = _available(f"{_PROC}/meminfo")
    for group in _limited_groups(_PROC, _GROUPS):
        free = min(free, group.free(enough=free))
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    if most != resource.RLIM_INFINITY:
        used = int((_read(f"{_PROC}/self/statm") or b"0").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        free = min(free, most - used)
    return max(free, 0)


def _available(info: str) -> float:
    text = _read(info, 256)  # short, since it is read in each step: MemAvailable is in the third line
    return float("inf") if text is None else _field(text, b"MemAvailable:") * 1024


class _Group(NamedTuple):
    """Memory limit of a control group, its files, and its field for reclaimable page cache."""

    limit: int
    used: str
    statistics: str
    reclaimable: bytes

    def free(self, enough: float) -> float:
        """Return the bytes below the limit. From `enough` on page cache, slow to read, is not added."""
        used = _read(self.used)
        if used is None:
            return float("inf")  # the group was removed
        free = self.limit - int(used)
        return free if free >= enough else free + _field(_read(self.statistics) or b"", self.reclaimable)


@functools.cache
def _limited_groups(proc: Path, root: Path) -> list[_Group]:
    """Return the groups with a limit, once per process: reading the files of all in each step takes too long."""
    return [group for group in _groups(proc, root) if group.limit < _UNLIMITED]


def _groups(proc: Path, root: Path) -> Iterator[_Group]:
    """Yield the groups of this process, of both versions, up to the root.

    https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
    """
    for line in (_read(f"{proc}/self/cgroup") or b"").decode(errors="surrogateescape").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            top, names = root, ("memory.max", "memory.current", b"inactive_file ")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file ")
        else:
            continue
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(top):
                break
            limit = (_read(f"{folder}/{names[0]}") or b"").strip()
            if limit.isdigit():
                yield _Group(int(limit), f"{folder}/{names[1]}", f"{folder}/memory.stat", names[2])


def _field(text: bytes, name: bytes) -> int:
    """Return the number after a name, 0 if the name is missing."""
    begin = text.find(name) if text.startswith(name) else text.find(b"\n" + name) + 1
    return int(text[begin + len(name) :].split(None, 1)[0]) if text.startswith(name, begin) else 0


def _read(path: str, size: int = 1 << 13) -> bytes | None:
    """Return the start of a file, None if it can't be read."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(file, size)
    except OSError:
        return None
    finally:
        os.close(file)


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
