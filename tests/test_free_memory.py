"""Free memory by the machine and the control groups of the process."""

from __future__ import annotations

import sys

import pytest
import torch

from skipkernels import memory, peak_memory

CPU, MIB = torch.device("cpu"), 1 << 20


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Return a writer of files of /proc and /sys/fs/cgroup by path, with 8 GiB available."""
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")

    def write(**files: object) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    write(**{"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\nHugePages_Total: 0"})
    return write


def group(folder: str, limit: object, used: int, inactive: int = 0) -> dict[str, object]:
    statistics = f"anon 5\nfile {inactive + 9}\ninactive_anon 5\ninactive_file {inactive}\nslab 3"
    files = {"memory.max": limit, "memory.current": used, "memory.stat": statistics}
    return {f"cgroup/{folder}{name}": text for name, text in files.items()}


VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               40000.
Pages active:                            300000.
Pages inactive:                          200000.
Pages speculative:                        10000.
Pages wired down:                        150000.
Pages purgeable:                           5000.
"Translation faults":                1234567890.
File-backed pages:                       180000.
"""


@pytest.mark.parametrize(
    ("text", "expected"), [(VM_STAT, 250000 * 16384), ("vm_stat: failed", float("inf"))], ids=["known", "unknown"]
)
@pytest.mark.skipif(sys.platform == "win32", reason="vm_stat is a script here")
def test_free_bytes_on_macos(tmp_path, monkeypatch, text, expected):
    program = tmp_path / "vm_stat"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory, "_VM_STAT", program)
    assert memory.free_bytes(CPU) == memory.free_bytes(torch.device("mps")) == expected
    assert memory.free_bytes(torch.device("xpu")) == float("inf")


def test_decisions_that_allow_are_kept(monkeypatch):
    """And a refusal is not: memory that is freed later is used. Within a capture the driver is not asked."""
    free, asked, sizes = memory.FreeMemory(), [], iter((200, 200, 200, 200, 400))
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device) or next(sizes))
    assert [free.allows(x, CPU) for x in (80, 100, 150, 101)] == [True, True, False, False]
    assert len(asked) == 4 and [free.allows(x, CPU) for x in (100, 7, 200, 199)] == [True] * 4 and len(asked) == 5
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not free.allows(1, torch.device("cuda"))


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="free memory is not known here")
def test_free_bytes_of_this_machine():
    assert 0 < memory.free_bytes(CPU) < 1 << 50


def test_free_bytes_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "linux")
    assert memory.free_bytes(torch.device("xpu")) == float("inf")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    assert memory.free_bytes(CPU) == float("inf")


def limited(*limits: object) -> dict[str, object]:
    """Groups a/b and a, and the root, of which each uses 200 MiB; their limits."""
    names = ("a/b/", "a/", "")
    return {k: v for name, limit in zip(names, limits, strict=True) for k, v in group(name, limit, 200 * MIB).items()}


NESTED = {"proc/self/cgroup": "4:memory:/x\n0::/a/b"}
LIMITS: dict[str, tuple[dict[str, object], int]] = {
    "none": ({}, 8 << 30),
    "page cache": ({"proc/self/cgroup": "0::/job", **group("job/", 300 * MIB, 250 * MIB, 30 * MIB)}, 80 * MIB),
    "own": (NESTED | limited(300 * MIB, "max", "max"), 100 * MIB),
    "above": (NESTED | limited("max", 300 * MIB, "max"), 100 * MIB),
    "root": (NESTED | limited("max", "max", 300 * MIB), 100 * MIB),
    "exceeded": ({"proc/self/cgroup": "0::/", **group("", 300 * MIB, 301 * MIB)}, 0),
}


@pytest.mark.parametrize(("files", "expected"), LIMITS.values(), ids=LIMITS)
def test_free_bytes_is_the_least_of_the_groups(system, files, expected):
    system(**files)
    assert memory.free_bytes(CPU) == expected


def test_peak_memory_without_a_high_water_mark(tmp_path, monkeypatch):
    """Some sandboxes leave it out of /proc/self/status."""
    monkeypatch.setattr(peak_memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t 9 kB\n")
    peak = peak_memory.PeakMemory(CPU)
    assert peak_memory.resource is None or peak.read() > 9 * MIB
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t 9 kB\n")
    assert peak.read() == 9 * 1024
