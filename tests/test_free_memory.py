"""Free memory by the machine and the control groups of the process."""

from __future__ import annotations

import sys

import pytest
import torch

from skipkernels import memory

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


def test_free_bytes_without_limits(system):
    assert memory.free_bytes(CPU) == 8 << 30


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
def test_free_bytes_on_macos(tmp_path, monkeypatch, text, expected):
    program = tmp_path / "vm_stat"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(memory, "_VM_STAT", program)
    assert memory.free_bytes(CPU) == memory.free_bytes(torch.device("mps")) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="not read on Windows")
def test_decisions_by_free_memory_are_kept(monkeypatch):
    free, asked = memory.FreeMemory(), []
    monkeypatch.setattr(memory, "free_bytes", lambda device: asked.append(device) or 200)
    assert [free.allows(x, CPU) for x in (80, 100, 150, 101)] == [True, True, False, False]
    assert len(asked) == 4 and [free.allows(x, CPU) for x in (100, 7, 200)] == [True, True, False] and len(asked) == 4


def test_free_bytes_of_this_machine():
    assert 0 < memory.free_bytes(CPU) < 1 << 50


def test_free_bytes_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    assert memory.free_bytes(CPU) == float("inf")


def test_free_bytes_adds_reclaimable_page_cache(system):
    system(**{"proc/self/cgroup": "0::/job"}, **group("job/", 300 * MIB, 250 * MIB, 30 * MIB))
    assert memory.free_bytes(CPU) == 80 * MIB


@pytest.mark.parametrize("limited", ["a/b/", "a/", ""], ids=["own", "above", "root"])
def test_free_bytes_is_minimum_over_groups(system, limited):
    for name in ("a/b/", "a/", ""):
        system(**group(name, 300 * MIB if name == limited else "max", 200 * MIB))
    system(**{"proc/self/cgroup": "4:memory:/x\n0::/a/b"})
    assert memory.free_bytes(CPU) == 100 * MIB


def test_free_bytes_is_never_negative(system):
    system(**{"proc/self/cgroup": "0::/"}, **group("", 300 * MIB, 301 * MIB))
    assert memory.free_bytes(CPU) == 0
