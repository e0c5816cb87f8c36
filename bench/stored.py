"""The rows in bench/results: which there are, and which of a case counts.

Of rows of the same case the last counts, but one that was left out, for want of time, counts only where nothing was
measured. A file with the columns of an earlier form counts as not there.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from skipkernels.ops import OPERATORS

from .pictures import PRECISIONS, Row

MACHINE = ("commit", "device", "threads", "python", "torch")


class Kind(NamedTuple):
    """Of rows: bench/results/DEVICE/NAME.csv.

    Attributes:
        command: The module that appends them.
        case: Columns that tell a row from those of something else.
        measured: The column that is empty where nothing was measured.
        needed: Others that files of an earlier form lack.
    """

    command: str
    case: str
    measured: str
    needed: str = ""


KINDS = {
    "step": Kind("bench.step", "model B C precision who", "p50_ms", "K peak_mib above_floor note"),
    "epoch": Kind("bench.epoch", "model images tests B C skip_layers precision who", "epoch_s", "faster note"),
    "infer": Kind("bench.infer", "model images B C skip_layers precision who", "p50_ms", "above_floor note"),
    "operators": Kind("bench.run", "op shape dtype who", "p50_ms", "of_ceiling note"),
    "profile": Kind("bench.profile", "step model B C skip_layers precision group", "p50_ms", "K share gflops"),
    "memory": Kind("bench.memory", "model B C skip_layers precision memory optimizer", "p50_ms", "gradients_mib"),
    "glyphs": Kind("bench.glyphs", "data method seed", "base", "harmonic trained_parameters"),
    "cache_build": Kind("bench.cache.build", "model images B precision dtype extraction", "images_s", "faster"),
    "cache_read": Kind("bench.cache.read", "store N W B", "loader_gb_s", "of_list"),
    "cache_disk": Kind("bench.cache.disk", "way store_mib memory_mib B", "gb_s", "of_threads"),
    "cache_epoch": Kind("bench.cache.epoch", "model images B C dtype precision", "share"),
    "cache_texts": Kind("bench.cache.texts", "model B C precision texts", "step_ms", "seconds_ready"),
}


class Device:
    """What was measured on one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._rows: dict[str, list[Row]] = {}

    def every(self, kind: str) -> list[Row]:
        """Rows in the order in which they were written."""
        if kind not in self._rows:
            self._rows[kind] = read(self.folder / f"{kind}.csv", KINDS[kind])
        return self._rows[kind]

    def rows(self, kind: str, **where: str) -> list[Row]:
        """The last of each case, of those where columns hold these values."""
        return [row for row in latest(self.every(kind), KINDS[kind]) if where.items() <= row.items()]

    @cached_property
    def name(self) -> str:
        """As the rows have it; "" where there are none."""
        return next((row["device"] for kind in KINDS for row in self.every(kind)), "")

    @property
    def is_cpu(self) -> bool:
        """A CPU's name ends with its vector instructions (`measure.cpu_name`)."""
        return self.name.endswith(")")


def devices(results: Path) -> list[Device]:
    """Those with rows, GPUs first."""
    found = [Device(folder) for folder in sorted(results.iterdir()) if folder.is_dir()]
    return sorted((device for device in found if device.name), key=lambda device: device.is_cpu)


def firsts(found: Sequence[Device]) -> list[Device]:
    """The first GPU, if there is one, and the first CPU."""
    by_kind = {device.is_cpu: device for device in reversed(found)}
    return [by_kind[is_cpu] for is_cpu in (False, True) if is_cpu in by_kind]


def read(path: Path, kind: Kind) -> list[Row]:
    """All rows of a file in today's form, else none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        needed = {*MACHINE, *kind.case.split(), kind.measured, *kind.needed.split()}
        return list(reader) if needed <= set(reader.fieldnames or ()) else []


def latest(rows: Iterable[Row], kind: Kind) -> list[Row]:
    """The last row of each case; but what was left out counts only where nothing was measured before."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        case = tuple(row[column] for column in kind.case.split())
        left_out = row.get("note", "").startswith("left out")
        if not (left_out and case in last and last[case][kind.measured]):
            last[case] = row
    return list(last.values())


def beside(rows: Sequence[Row], row: Row, **other: str) -> Row | None:
    """The last row of the same commit, machine and case, but for these columns, in which something was measured."""
    same = {column: row[column] for column in (*MACHINE, *KINDS["step"].case.split())} | other
    found = [each for each in rows if same.items() <= each.items() and each["p50_ms"]]
    return found[-1] if found else None


def ordered(rows: Iterable[Row], who: Sequence[str], columns: str) -> list[Row]:
    """By these columns, then by who: numbers by their value, precisions as everywhere."""

    def place(row: Row) -> tuple:
        values = [row[column] for column in columns.split()] + [row["who"]]
        known = [*PRECISIONS, *who]
        return tuple(
            (int(value), "") if value.isdigit() else (known.index(value) if value in known else len(known), value)
            for value in values
        )

    return sorted(rows, key=place)


def grouped(rows: Iterable[Row], columns: str) -> dict[tuple[str, ...], list[Row]]:
    """By the values of these columns, in the order in which they come."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns.split()), []).append(row)
    return found


def by_operator(rows: Iterable[Row], columns: str = "") -> list[tuple[tuple[str, ...], list[Row]]]:
    """Groups of the same operator and columns, operators in the order of the package."""
    groups = grouped((row for row in rows if row["op"] in OPERATORS), f"op {columns}")
    return sorted(groups.items(), key=lambda group: OPERATORS.index(group[0][0]))
