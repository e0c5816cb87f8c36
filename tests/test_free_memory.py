"""Free memory by the machine, the control groups of the process and its address space."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from skipkernels import memory

CPU, MIB = torch.device("cpu"), 1 << 20


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Return a writer of files of /proc and /sys/fs/cgroup by path, with 8 GiB available."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def write(**files: object) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    write(**{"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {8 << 20} kB\nBuffers: 1 kB"})
    return write


def version_2(folder: str, limit: object, used: int, inactive: int = 0) -> dict[str, object]:
    statistics = f"anon 5\nfile {inactive + 9}\ninactive_anon 5\nactive_file 9\ninactive_file {inactive}\nslab 3"
    files = {"memory.max": limit, "memory.current": used, "memory.stat": statistics}
    return {f"cgroup/{folder}{name}": text for name, text in files.items()}


def version_1(folder: str, limit: int, used: int, inactive: int = 0) -> dict[str, object]:
    statistics = f"inactive_file 1\ntotal_cache 5\ntotal_inactive_file {inactive}\ntotal_active_file 7"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": statistics}
    return {f"cgroup/memory/{folder}{name}": text for name, text in files.items()}


def test_free_bytes_without_limits(system):
    assert memory.free_bytes(CPU) == 8 << 30


def test_free_bytes_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    assert memory.free_bytes(CPU) > 1 << 60 or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def test_free_bytes_adds_reclaimable_page_cache(system):
    system(**{"proc/self/cgroup": "0::/job"}, **version_2("job/", 300 * MIB, 250 * MIB, 30 * MIB))
    assert memory.free_bytes(CPU) == 80 * MIB


@pytest.mark.parametrize("limited", ["a/b/", "a/", ""], ids=["own", "above", "root"])
def test_free_bytes_is_minimum_over_groups(system, limited):
    groups = {name: (300 * MIB if name == limited else "max") for name in ("a/b/", "a/", "")}
    files = [version_2(name, limit, 200 * MIB) for name, limit in groups.items()]
    system(**{"proc/self/cgroup": "0::/a/b"}, **files[0], **files[1], **files[2])
    assert memory.free_bytes(CPU) == 100 * MIB


def test_free_bytes_in_container_with_path_of_host(system):
    system(**{"proc/self/cgroup": "7:cpu:/x\n4:memory:/docker/01ab\n1:name=systemd:/x"})
    system(**version_1("", 300 * MIB, 250 * MIB, 30 * MIB))
    assert memory.free_bytes(CPU) == 80 * MIB


def test_free_bytes_version_1_without_limit(system):
    system(**{"proc/self/cgroup": "4:memory:/"}, **version_1("", 9223372036854771712, 250 * MIB))
    assert memory.free_bytes(CPU) == 8 << 30


def test_free_bytes_is_never_negative(system):
    system(**{"proc/self/cgroup": "0::/"}, **version_2("", 300 * MIB, 100 * MIB))
    assert memory.free_bytes(CPU) == 200 * MIB
    system(**version_2("", 300 * MIB, 301 * MIB))
    assert memory.free_bytes(CPU) == 0


def test_free_bytes_with_limited_address_space(system, monkeypatch):
    system(**{"proc/self/statm": "1000 500 3"})
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64 * MIB, resource.RLIM_INFINITY))
    assert memory.free_bytes(CPU) == 64 * MIB - 1000 * resource.getpagesize()


def test_free_bytes_reads_few_files(system, monkeypatch):
    """Called in each step: groups without a limit are read once, page cache only if it matters."""
    system(**{"proc/self/cgroup": "0::/a"}, **version_2("", "max", 1), **version_2("a/", 20 << 30, 1))
    memory.free_bytes(CPU)
    read, paths = memory._read, []
    monkeypatch.setattr(memory, "_read", lambda path, *size: paths.append(Path(path).name) or read(path, *size))
    memory.free_bytes(CPU)
    assert paths == ["meminfo", "memory.current"]
