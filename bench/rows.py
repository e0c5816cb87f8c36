"""Rows of results, bench/results/DEVICE/KIND.csv: how they are stored, and which row of a case counts.

Of several rows of one case the last counts, except that a row that was skipped for lack of time does not replace a
measurement. In files that count rounds, rows of one round, or of another PyTorch than the last row's, do not count.
"""

from __future__ import annotations

import argparse
import csv
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skipkernels.folders import replaced_file

Row = dict[str, str]
"""One line of a CSV file: text by column, "" where there is no value."""

RESULTS = Path(__file__).with_name("results")
MACHINE = ("commit", "device", "threads", "python", "torch")
PRECISIONS = ("fp32", "bf16")


class Kind(NamedTuple):
    """One kind of rows."""

    command: str
    """Command that writes the rows, after `python -m`."""
    case: str
    """Columns that identify a case."""
    measured: str
    """Column that is empty if nothing was measured."""


KINDS = {
    "step": Kind("bench.step", "model B C precision implementation", "p50_ms"),
    "infer": Kind("bench.infer", "model images B C skip_layers precision implementation", "p50_ms"),
    "operators": Kind("pytest bench/operators", "op shape dtype implementation", "p50_ms"),
    "fuse": Kind("bench.fuse", "model B precision part implementation", "p50_ms"),
    "default": Kind("bench.default", "name", "p50_s"),
    "when": Kind("bench.when", "task method phase seed setting blended head", "base"),
    "when_cost": Kind("bench.when --cost", "task method epoch", "train_s"),
    "when_steps": Kind("bench.when --steps", "task method", "step_s"),
    "when_own": Kind("bench.when --own", "task method seed", "accuracy"),
    "when_trials": Kind("bench.when --trials", "seed trial", "base"),
}

_SHOWN = {
    "saved_mib": "{} MiB saved",
    "peak_mib": "{} MiB at the peak",
    "above_floor": "{:.2f} times the floor",
    "faster": "skipkernels is {:.2f} times as fast",
    "kernels": "{} kernels",
    "copies": "{} copies or fills",
    "eager_difference": "weights differ by {} between eager runs",
    "replay_difference": "by {} after replays",
    "note": "{}",
}


# ---- storing ---------------------------------------------------------------------------------------------------------


def command(description: str | None) -> argparse.ArgumentParser:
    """A parser of a command that appends or writes rows."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-save", action="store_true", help="print only")
    return parser


def machine_columns(device: torch.device) -> dict[str, Any]:
    """Columns of every row: commit, device, threads and versions."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True)
        except FileNotFoundError:  # git is not installed
            return ""
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS.name}")  # except results
    commit = git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "commit": commit or "unknown",
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """Model name and widest vector instructions of the CPU; on arm64, which has no name, the numbers of the part."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    extras = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    numbers = [fields[key] for key in ("CPU implementer", "CPU part") if key in fields]
    name = fields.get("model name") or " ".join([platform.processor() or platform.machine(), *numbers])
    return f"{name} ({' '.join(extras)})"


def slug(device: str) -> str:
    """A device name as a folder name.

    >>> slug("AMD EPYC (avx2 avx512_bf16)")
    'amd-epyc-avx2-avx512_bf16'
    """
    return re.sub(r"[^a-z0-9_]+", "-", device.lower()).strip("-")


def save(args: argparse.Namespace, rows: list[dict[str, Any]], table: str, results: Path | None = None) -> None:
    """Append rows, with the columns of the machine, unless --no-save was given."""
    if rows and not args.no_save:
        print(f"appended to {append_rows([machine_columns(args.device) | row for row in rows], table, results)}")


def append_rows(rows: list[dict[str, Any]], name: str, results: Path | None = None) -> Path:
    """Append rows to DEVICE/NAME.csv in bench/results or another folder. Columns that the file lacks are added."""
    path = (results or RESULTS) / slug(rows[0]["device"]) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    before: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            before = list(csv.DictReader(file))
    columns = list(dict.fromkeys(column for row in (*before[:1], *rows) for column in row))
    with replaced_file(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*before, *rows])
    return path


def shown(row: dict[str, Any]) -> str:
    """The measurements of a row as text, or the reason why there are none."""
    if row["p50_ms"] == "":
        return str(row["note"])
    parts = [form.format(row[column]) for column, form in _SHOWN.items() if row.get(column, "") != ""]
    return ", ".join([f"{row['p50_ms']:9} ms (p20 {row['p20_ms']}, p80 {row['p80_ms']})", *parts])


# ---- reading ---------------------------------------------------------------------------------------------------------


def all_rows(kind: str, **where: str) -> list[Row]:
    """The rows of a kind that can count and have these values, of all devices, in the order of each file."""
    found: list[Row] = []
    for path in sorted(RESULTS.glob(f"*/{kind}.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, restval=""))
        version = rows[-1]["torch"]
        found += [row for row in rows if "rounds" not in row or (row["rounds"] != "1" and row["torch"] == version)]
    return [row for row in found if where.items() <= row.items()]


def latest_rows(kind: str, **where: str) -> list[Row]:
    """The rows of a kind that count among those with these values."""
    return latest(all_rows(kind, **where), KINDS[kind])


def latest(rows: Iterable[Row], kind: Kind) -> list[Row]:
    """The row of each case that counts."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        case = tuple(row.get(column, "") for column in kind.case.split())
        skipped = row.get("note", "").startswith("left out")
        if not (skipped and case in last and last[case][kind.measured]):
            last[case] = row
    return list(last.values())


def same_run(rows: Sequence[Row], row: Row, **changes: str) -> Row | None:
    """The last measured step of the same commit, machine and case as `row`, with `changes` to the case."""
    same = {column: row[column] for column in (*MACHINE, *KINDS["step"].case.split())} | changes
    return next((each for each in reversed(rows) if same.items() <= each.items() and each["p50_ms"]), None)


def number(row: Row, column: str) -> float | None:
    """The value of a column, or None.

    >>> number({"p50_ms": "12.5", "peak_mib": ""}, "p50_ms"), number({"peak_mib": ""}, "peak_mib")
    (12.5, None)
    """
    return float(row[column]) if row.get(column) else None


def grouped(rows: Iterable[Row], columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the values of these columns, in order of first occurrence."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns.split()), []).append(row)
    return found
