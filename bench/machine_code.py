"""Counts in a compiled kernel that bound its speed: width of loads, local memory, barriers and copies in loops, and the
rounds of dependent loads, which bound its time from below.

Everything is read from listings by regular expressions: SASS (nvdisasm), amdgcn, and Triton's first intermediate
representation (TTIR), in which loops and values still have names.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from skipkernels.ops import launching

LATENCY = 450  # cycles of a load beyond the L2 cache; measured values for A100 are 400 to 570


class MachineCode(NamedTuple):
    """Counts in a listing.

    Attributes:
        load_bits: Bits per thread of the widest load from global memory.
        local_accesses: Loads from and stores to local (NVIDIA) or scratch memory (AMD).
        loop_barriers: Barriers of a block within loops, each instruction once.
        loop_copies: Asynchronous copies from global to shared memory within loops.
    """

    load_bits: int
    local_accesses: int
    loop_barriers: int
    loop_copies: int


class _Syntax(NamedTuple):
    label: re.Pattern[str]
    branch: re.Pattern[str]
    load: re.Pattern[str]
    bits: Callable[[str], int]
    local: re.Pattern[str]
    barrier: re.Pattern[str]
    copy: re.Pattern[str]


_SASS = _Syntax(
    label=re.compile(r"^\s*(\.L_x_\d+):"),
    branch=re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)"),
    load=re.compile(r"\b(?:LDG|LDGSTS)\.E\S*?(?:\.(U?\d+))?(?=[\s.])\S*"),
    bits=lambda text: max([32, *(int(bits) for bits in re.findall(r"\.(64|128|256)\b", text))]),
    local=re.compile(r"\b(?:LDL|STL)\b"),
    barrier=re.compile(r"\bBAR\.SYNC"),
    copy=re.compile(r"\b(?:LDGSTS|UBLKCP|UTMALDG)\b"),
)
_AMDGCN = _Syntax(
    label=re.compile(r"^(\.LBB\d+_\d+):"),
    branch=re.compile(r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)"),
    load=re.compile(r"\b(?:global|buffer|flat)_load_\w+"),
    bits=lambda text: 32 * int((re.findall(r"dwordx(\d)", text) or ["1"])[0]),
    local=re.compile(r"\bscratch_(?:load|store)_"),
    barrier=re.compile(r"\bs_barrier\b"),
    copy=re.compile(r"\b(?:global_load_lds|buffer_load_\w+ .*\blds\b)"),
)


def sass(cubin: bytes) -> str:
    """Disassemble a kernel with the nvdisasm of Triton's package."""
    tool = Path(launching.triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", "-ndf", file.name], check=True, capture_output=True, text=True).stdout


def counts_of(listing: str, *, amd: bool) -> MachineCode:
    """Count in a listing of SASS or amdgcn."""
    syntax, lines = (_AMDGCN if amd else _SASS), listing.splitlines()
    labels = {found[1]: number for number, line in enumerate(lines) if (found := syntax.label.match(line))}
    in_loop = [False] * len(lines)
    for number, line in enumerate(lines):
        found = syntax.branch.search(line)
        if found and labels.get(found[1], number) < number:  # backwards: everything in between is a loop
            start = labels[found[1]]
            in_loop[start : number + 1] = [True] * (number + 1 - start)
    loads = [syntax.bits(found[0]) for line in lines if (found := syntax.load.search(line))]
    looped = [line for line, looped in zip(lines, in_loop, strict=True) if looped]
    return MachineCode(
        load_bits=max(loads, default=0),
        local_accesses=sum(bool(syntax.local.search(line)) for line in lines),
        loop_barriers=sum(bool(syntax.barrier.search(line)) for line in looped),
        loop_copies=sum(bool(syntax.copy.search(line)) for line in looped),
    )


# ---- rounds of dependent loads ---------------------------------------------------------------------------------------

_FOR = re.compile(r"(?:(%\w+)(?::\d+)? = )?scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)(?: iter_args\((.*?)\) ->)?")
_ASSIGNED = re.compile(r"(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)")
_VALUE = re.compile(r"%\w+")
_LOADS = ("tt.load", "tt.descriptor_load")


def rounds(ttir: str, integers: Mapping[str, int], grid: tuple[int, ...], overlapped: int = 1) -> int:
    """Estimate how often the first program of a kernel waits for loads.

    Loads wait for each other if one needs the result of the other, as a row needs its index, and in a loop each
    iteration waits, unless its loads are copied ahead. Number of iterations are computed from the arguments; where they
    depend on loaded values, a known bound by a minimum is used, or else one iteration.

    Args:
        ttir: The kernel before optimisation.
        integers: Integer arguments by name.
        grid: Programs in each dimension.
        overlapped: Iterations with loads in flight at once, in a loop with a matrix product.
    """
    return _Rounds(ttir, integers, grid, overlapped).count()


class _Rounds:
    def __init__(self, ttir: str, integers: Mapping[str, int], grid: tuple[int, ...], overlapped: int):
        lines = [re.sub(r"\s*loc\(.*$", "", line).strip() for line in ttir.splitlines()]
        self.lines = [line for line in lines if line and not line.startswith("#")]
        self.values: dict[str, int | None] = {f"%{name}": value for name, value in integers.items()}
        self.depth: dict[str, int] = {}  # rounds of loads in front of a value
        self.grid, self.overlapped = grid, overlapped

    def count(self) -> int:
        return self.block(0, 0)[1]

    def block(self, at: int, start: int) -> tuple[int, int]:
        """Read a block that begins after `start` rounds: the line behind it, and the rounds at its end."""
        now, braces = start, 0
        while at < len(self.lines):
            line = self.lines[at]
            if found := _FOR.match(line):
                at, now = self.loop(at, now, found)
                start = now
                continue
            braces += line.count("{") - line.count("}")
            if braces < 0:
                break
            if found := _ASSIGNED.match(line):
                name, operator, rest = found.groups()
                operands = _VALUE.findall(rest)
                depth = max([start if operator in _LOADS else 0, *(self.depth.get(x, 0) for x in operands)])
                self.depth[name] = depth + (operator in _LOADS)
                now = max(now, self.depth[name])
                self.values[name] = self.scalar(operator, operands, rest)
            at += 1
        return at + 1, now

    def loop(self, at: int, start: int, found: re.Match[str]) -> tuple[int, int]:
        result, index, first, last, step, carried = found.groups()
        bounds = [self.values.get(x) for x in (first, last, step)]
        trips = 1 if None in bounds else max(0, math.ceil((bounds[1] - bounds[0]) / bounds[2]))  # type: ignore[operator]
        self.values[index] = self.values.get(first)
        for name, initial in re.findall(r"(%\w+) = (%\w+)", carried or ""):
            self.values[name], self.depth[name] = self.values.get(initial), start
        end, now = self.block(at + 1, start)
        pipelined = any("tt.dot" in line for line in self.lines[at:end])
        waits = math.ceil(trips / self.overlapped) if pipelined else trips
        now = start + waits * (now - start)
        if result:
            self.depth[result] = now
        return end, now

    def scalar(self, operator: str, operands: list[str], rest: str) -> int | None:
        """The value of an integer operation; None if it is not known."""
        if operator == "arith.constant":
            found = re.match(r" (-?\d+) : ", rest)
            return int(found[1]) if found else None
        if operator in ("tt.get_program_id", "tt.get_num_programs"):
            return 0 if operator == "tt.get_program_id" else self.grid[" xyz".index(rest.split()[0]) - 1]
        known = [self.values.get(x) for x in operands]
        if operator in ("arith.minsi", "arith.minui"):
            return min((x for x in known if x is not None), default=None)
        if not known or None in known:
            return None
        x, y = known[0], known[-1]
        assert x is not None and y is not None
        if operator in ("arith.divsi", "arith.remsi") and y == 0:
            return None
        operations = {
            "arith.addi": x + y,
            "arith.subi": x - y,
            "arith.muli": x * y,
            "arith.maxsi": max(x, y),
            "arith.extsi": x,
            "arith.trunci": x,
            "arith.index_cast": x,
        }
        if operator in operations:
            return operations[operator]
        return {"arith.divsi": lambda: x // y, "arith.remsi": lambda: x % y}.get(operator, lambda: None)()
