"""The tables of README.md and docs/, and the pictures, written from the stored results: nobody types a number.

    python -m bench.report            write what is not up to date
    python -m bench.report --check    write nothing; exit 1 and name the files that are not up to date

A page has pairs of comments, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; this module writes what stands between
them. Pictures are bench/results/DEVICE/NAME.svg. README.md and docs/operators.md show the first GPU, if there is one,
and the first CPU; docs/benchmarks.md every device that has rows.

Of rows of the same case the last counts, but one that was left out, for want of time, counts only where nothing was
measured. Ratios are those that were measured within one run; what is compared beyond them is of the same commit,
versions and threads. A file with the columns of an earlier form counts as not there.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import matplotlib

from skipkernels.ops import OPERATORS
from skipkernels.studies.runs import spread

from . import epoch, infer, measure, pictures, step
from .pictures import PRECISIONS, Row, number

ROOT = Path(__file__).parents[1]
OURS, EAGER = step.OURS, "eager"
MACHINE = ("commit", "device", "threads", "python", "torch")

SHOWN = {"model": "ViT-B-16", "B": "4"}  # of the steps, by README.md and the pictures
HEADLINE = 1000  # classes
FEW, MANY = 10, 21841  # classes
# What is wanted of a step: how many times that with few classes one with many takes at most; on a CPU, times its floor.
GROWTH, FLOORS = 1.5, {"fp32": 1.6, "bf16": 2.5}
WORST = 5  # comparisons that README.md shows
METHODS = {
    "zero-shot": "zero-shot",
    "linear-probe": "linear probe",
    "coop": "CoOp",
    "clip-adapter": "CLIP-Adapter",
    "lora": "CLIP-LoRA",
    "full": "full fine-tuning",
    "skip": "Skip Tuning",
}


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


# ---- stored rows -----------------------------------------------------------------------------------------------------


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


# ---- numbers as text, and Markdown -----------------------------------------------------------------------------------


def figure(value: float | None, unit: str = "") -> str:
    """Three digits, or all of them before the point.

    >>> figure(0.2714), figure(12.71, " ms"), figure(48188.4), figure(0.0), figure(None, " ms")
    ('0.271', '12.7 ms', '48,188', '0', '')
    """
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f}{unit}"


def times(value: float | None) -> str:
    """How many times; in bold what is less than once, however little.

    >>> times(2.444), times(38.21), times(0.63), times(0.9971), times(None)
    ('2.44', '38.2', '**0.63**', '**0.997**', '')
    """
    if value is None:
        return ""
    if value < 1:
        return f"**{value:.{3 if value >= 0.995 else 2}f}**"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def span(values: Iterable[float]) -> str:
    """From the least to the most.

    >>> span([1.5, 0.63, 1.1]), span([2.0])
    ('**0.63** to 1.50', '2.00')
    """
    found = list(values)
    return " to ".join(dict.fromkeys(map(times, (min(found), max(found)))))


def classes(C: str) -> str:
    """1,000 classes."""
    return f"{int(C):,} classes"


Cell = Callable[[Row], str]


def text(column: str) -> Cell:
    return lambda row: row[column]


def count(column: str) -> Cell:
    return lambda row: f"{int(row[column]):,}" if row[column] else ""


def size(column: str, unit: str = "") -> Cell:
    return lambda row: figure(number(row, column), unit)


def ratio(column: str) -> Cell:
    return lambda row: times(number(row, column))


def quantiles(row: Row) -> str:
    """Between which the middle three fifths of the times are."""
    return f"{figure(number(row, 'p20_ms'))} to {figure(number(row, 'p80_ms'))}" if row["p50_ms"] else ""


def case_of(known: Mapping[str, str]) -> dict[str, Cell]:
    """Columns that say which step, but for what is known."""
    columns: dict[str, Cell] = {"model": text("model"), "B": text("B"), "precision": text("precision")}
    columns |= {"classes": lambda row: f"{int(row['K']):,} of {int(row['C']):,}"}
    return {name: cell for name, cell in columns.items() if name not in known}


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Without the columns in which nothing stands."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    kept = [place for place in range(len(header)) if place == 0 or any(line[place] for line in cells)]
    return "\n".join(
        f"| {' | '.join(line[place] for place in kept)} |" for line in [header, ["---"] * len(header), *cells]
    )


def listed(rows: Iterable[Row], columns: Mapping[str, Cell]) -> str:
    """A table with a line for each row."""
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def origin(rows: Mapping[str, Sequence[Row]]) -> str:
    """The small line under a table: where its rows, by their kind, come from."""

    def of(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for each in rows.values() for row in each))

    commands = ", ".join(f"`python -m {KINDS[kind].command}`" for kind, each in rows.items() if each)
    return f"<sub>{of('device')}, {of('threads')} threads; torch {of('torch')}; commit {of('commit')}; {commands}</sub>"


def folded(title: str, content: str) -> str:
    """Shown on a click."""
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


# ---- steps -----------------------------------------------------------------------------------------------------------


class Growth(NamedTuple):
    """From a step of ours with few classes to one with many."""

    few: Row
    many: Row

    @property
    def time(self) -> float:
        return float(self.many["p50_ms"]) / float(self.few["p50_ms"])

    def __str__(self) -> str:
        few, many = (number(row, "peak_mib") for row in self)
        return f"{times(self.time)} times the time" + (
            f", {times(many / few)} times the memory" if few and many else ""
        )


def growth_of(device: Device, **case: str) -> Growth | None:
    """None where not both were measured at the same commit."""
    for many in device.rows("step", **case, who=OURS, C=str(MANY)):
        few = beside(device.every("step"), many, C=str(FEW))
        if few and many["p50_ms"]:
            return Growth(few, many)
    return None


def headline(device: Device) -> str:
    """Three numbers, each with the command that checks it."""
    used: list[Row] = []
    faster, kept, grown = [], [], []
    for precision in PRECISIONS:
        case = SHOWN | {"precision": precision}
        published = next(iter(device.rows("step", **case, C=str(HEADLINE), who=step.PUBLISHED)), None)
        ours = beside(device.every("step"), published, who=OURS) if published and published["faster"] else None
        used += [published, ours] if published and ours else []
        faster.append(f"{times(number(published, 'faster'))} times faster" if published and ours else "")
        sizes = [figure(number(row, "saved_mib"), " MiB") for row in (published, ours) if row and ours]
        kept.append(" → ".join(sizes))
        growth = growth_of(device, **case)
        used += growth or ()
        grown.append(str(growth or ""))
    if not used:
        return ""
    check = "`python -m bench.step --classes {} --who {}`"
    lines = [
        [f"a step at {HEADLINE:,} classes, against the published one", *faster],
        ["what it keeps for backward, the published one → ours", *kept],
        [f"a step at {MANY:,} classes, of one at {FEW}", *grown],
    ]
    checks = [check.format(HEADLINE, "skipkernels published"), "the same", check.format(f"{FEW} {MANY}", "skipkernels")]
    lines = [[*line, how] for line, how in zip(lines, checks, strict=True)]
    return paragraphs(table(["", *PRECISIONS, "to check it"], lines), origin({"step": used}))


def not_run(row: Row) -> str:
    """In a cell, why there is no time.

    >>> not_run({"note": "does not fit: 500 classes keep …"}), not_run({"note": "left out: a step takes about 73 s"})
    ('does not fit', 'not run: about 73 s')
    """
    about = re.search(r"about [\d.]+ s", row["note"])
    if row["note"].startswith("left out"):
        return f"not run: {about[0]}" if about else "not run"
    return row["note"].split(":")[0]


def timed(row: Row) -> str:
    """In a cell: milliseconds, and how many times faster ours is."""
    faster = times(number(row, "faster"))
    return figure(number(row, "p50_ms")) + (f" ({faster})" if faster else "") if row["p50_ms"] else not_run(row)


def over_classes(rows: Sequence[Row], cell: Cell, header: str = "", who: Sequence[str] = step.WHO) -> list[list[str]]:
    """A table's header and a line for everyone and each precision, with a cell for each number of classes."""
    by_case = {(row["who"], row["precision"], row["C"]): row for row in rows}
    columns = sorted({row["C"] for row in rows}, key=int)
    lines = [
        [name, precision, *(cell(row) if (row := by_case.get((name, precision, C))) else "" for C in columns)]
        for precision in PRECISIONS
        for name in who
    ]
    return [[header, "", *(f"C = {int(C):,}" for C in columns)], *(line for line in lines if any(line[2:]))]


def step_times(rows: Sequence[Row]) -> str:
    header, *lines = over_classes(rows, timed)
    taking_part = over_classes(rows, count("K"), who=(OURS,))[1:2]
    return table(header, [["classes that take part in ours", "", *line[2:]] for line in taking_part] + lines)


def step_floors(rows: Sequence[Row]) -> str:
    """How many times its floor each takes."""
    header, *lines = over_classes(rows, ratio("above_floor"), "times the floor")
    return table(header, lines)


def step_memory(rows: Sequence[Row]) -> str:
    """Kept for backward, and the rise at the peak."""

    def cell(row: Row) -> str:
        return f"{size('saved_mib')(row)} / {size('peak_mib')(row)}" if row["peak_mib"] else ""

    header, *lines = over_classes(rows, cell, "MiB kept for backward / at the peak")
    return table(header, lines)


def step_shown(device: Device) -> str:
    rows = device.rows("step", **SHOWN)
    return paragraphs(step_times(rows), origin({"step": rows})) if rows else ""


EVERY_STEP: dict[str, Cell] = {"C": count("C"), "K": count("K"), "precision": text("precision"), "who": text("who")}
EVERY_STEP |= {"ms": size("p50_ms"), "p20 to p80": quantiles, "rounds": text("rounds")}
EVERY_STEP |= {"ours is faster, times": ratio("faster"), "GFLOP": size("gflop"), "floor, ms": size("floor_ms")}
EVERY_STEP |= {"launches": text("launches"), "as a graph, ms": size("graph_ms"), "note": text("note")}


def steps(device: Device) -> str:
    """Every model and batch: over the number of classes, and every row."""
    parts = []
    every = ordered(device.rows("step"), step.WHO, "model B C precision")
    for (model, batch), rows in grouped(every, "model B").items():
        parts += [f"**{model}, batch {batch}**", step_times(rows), step_floors(rows), step_memory(rows)]
        parts += [folded("every row", listed(rows, EVERY_STEP)), origin({"step": rows})]
    return paragraphs(*parts)


# ---- epochs, memory, classifying, glyphs -----------------------------------------------------------------------------

EPOCH: dict[str, Cell] = {"": text("who"), "features": size("features_s", " s"), "steps": size("training_s", " s")}
EPOCH |= {"evaluation": size("evaluation_s", " s"), "epoch": size("epoch_s", " s"), "a step": size("step_ms", " ms")}
EPOCH |= {"ours is faster, times": ratio("faster"), "peak": size("peak_mib", " MiB"), "mean loss": text("loss")}
EPOCH |= {"note": text("note")}


def epochs(device: Device) -> str:
    parts = []
    every = ordered(device.rows("epoch"), epoch.WHO, "model images C B precision")
    for (model, images, tests, B, C, precision), rows in grouped(every, "model images tests B C precision").items():
        title = f"**{model}, {precision}**: {images} images of {classes(C)} in batches of {B}, {tests} test images"
        parts += [title, listed(rows, EPOCH), origin({"epoch": rows})]
    return paragraphs(*parts)


def memory(device: Device, **where: str) -> str:
    rows = device.rows("memory", **where)

    def name(row: Row) -> str:
        kept = f', `memory="{row["memory"]}"`' if row["memory"] != "fast" else ""
        return f"`{row['optimizer']}`{kept}"

    columns = {"": name} | case_of(where)
    columns |= {"step": size("p50_ms", " ms"), "kept for backward": size("saved_mib", " MiB")}
    columns |= {"gradients at once": size("gradients_mib", " MiB")}
    columns |= {"memory above that between steps": size("peak_mib", " MiB")}
    return paragraphs(listed(rows, columns), origin({"memory": rows})) if rows else ""


def classifying(device: Device, **where: str) -> str:
    """A line for each number of images and classes, a column for everyone."""
    rows = ordered(device.rows("infer", **where), infer.WHO, "model images B C precision")
    if not rows:
        return ""

    def cell(row: Row | None) -> str:
        if row is None or not row["p50_ms"]:
            return not_run(row) if row else ""
        faster = times(number(row, "faster")) if row["who"] != infer.CACHED else ""  # no other way: the same, later
        return figure(float(row["p50_ms"]) / 1000, " s") + (f" ({faster})" if faster else "")

    lines = []
    for (model, images, B, C, precision), of in grouped(rows, "model images B C precision").items():
        by_who = {row["who"]: row for row in of}
        floor = times(number(by_who.get(OURS, {}), "above_floor"))
        lines.append([model, images, B, f"{int(C):,}", precision, *(cell(by_who.get(who)) for who in infer.WHO), floor])
    header = ["model", "images", "B", "C", "precision", *infer.WHO, f"{OURS}, times its floor"]
    known = len(where)  # stands before the table
    return paragraphs(table(header[known:], [line[known:] for line in lines]), origin({"infer": rows}))


def glyphs(device: Device) -> str:
    """Means and deviations over the seeds."""
    rows = device.rows("glyphs", data="glyphs")
    if not rows:
        return ""
    lines = []
    by_method = {method: of for (method,), of in grouped(rows, "method").items()}
    for method in [*METHODS, *(by_method.keys() - METHODS.keys())]:
        if of := by_method.get(method):
            line = [METHODS.get(method, method), str(len(of))]
            line += [mean(of, column, digits=1) or "none" for column in ("base", "new", "harmonic")]
            line += [mean(of, "tuning_s", " s"), mean(of, "step_ms", " ms"), mean(of, "peak_mib", " MiB")]
            lines.append([*line, "fitted" if method == "linear-probe" else count("trained_parameters")(of[-1])])
    header = ["", "seeds", "base", "new", "harmonic mean", "tuning", "step", "peak memory", "trained"]
    return paragraphs(table(header, lines), origin({"glyphs": rows}))


def mean(rows: Sequence[Row], column: str, unit: str = "", digits: int | None = None) -> str:
    """And deviation; "" where one has none, or where it is 0."""
    found = spread(number(row, column) for row in rows)
    if found is None or not found.mean:
        return ""
    return found.text((2 if found.mean < 1 else 1 if found.mean < 20 else 0) if digits is None else digits) + unit


# ---- operators, time budget, caches ----------------------------------------------------------------------------------


def operators_shown(device: Device) -> str:
    """How many times faster than eager and than the fastest other, a line for each shape."""
    rows = device.rows("operators")
    if not rows:
        return ""
    dtypes = [dtype for (dtype,) in grouped(rows, "dtype")]
    lines = []
    for (op, shape), of in by_operator(rows, "shape"):
        alike = {dtype: [row for row in of if row["dtype"] == dtype and row["faster"]] for dtype in dtypes}
        eager = ["".join(times(float(row["faster"])) for row in alike[d] if row["who"] == EAGER) for d in dtypes]
        others = [fastest([row for row in alike[dtype] if row["who"] != EAGER]) for dtype in dtypes]
        wanted = dict.fromkeys(row["wanted"] for row in of if row["wanted"])
        lines.append([f"`{op}`", shape, *eager, ", ".join(wanted), *others])
    header = ["", "shape", *(f"than eager, {dtype}" for dtype in dtypes), "wanted"]
    header += [f"than the fastest other, {dtype}" for dtype in dtypes]
    return paragraphs(table(header, lines), origin({"operators": rows}))


def fastest(others: Sequence[Row]) -> str:
    """In a cell: how many times faster ours is than the fastest of them, and who that is."""
    if not others:
        return ""
    row = min(others, key=lambda other: float(other["faster"]))
    return f"{times(float(row['faster']))}, {row['who']}"


EVERY_OPERATOR: dict[str, Cell] = {"shape": text("shape"), "dtype": text("dtype"), "who": text("who")}
EVERY_OPERATOR |= {"ms": size("p50_ms"), "p20 to p80": quantiles, "ours is faster, times": ratio("faster")}
EVERY_OPERATOR |= {"wanted": text("wanted"), "peak, MiB": text("peak_mib"), "GB/s": size("gbytes_s")}
EVERY_OPERATOR |= {"GFLOP/s": size("gflops_s"), "of the ceiling": size("of_ceiling"), "note": text("note")}


def operators(device: Device) -> str:
    """Every row, each operator's on a click, and why someone could not run."""
    rows = device.rows("operators")
    parts = [folded(f"<code>{op}</code>", listed(of, EVERY_OPERATOR)) for (op,), of in by_operator(rows)]
    return paragraphs(*parts, origin({"operators": rows})) if rows else ""


def budget(device: Device) -> str:
    rows = device.rows("profile")

    def rate(row: Row) -> str:
        reached, most = number(row, "gflops"), number(row, "peak_gflops")
        return f"{figure(reached)} of {figure(most)} GFLOP/s" if reached and most else ""

    columns = {"step": text("step")} | case_of({}) | {"": text("group"), "median": size("p50_ms", " ms")}
    columns |= {"share": lambda row: f"{100 * float(row['share']):.1f} %", "reached, of one large product": rate}
    return paragraphs(listed(rows, columns), origin({"profile": rows})) if rows else ""


class Cached(NamedTuple):
    """What is shown of each row about the feature cache; of those for which `what` is "", nothing."""

    what: Cell
    result: Cell
    against: str = ""
    faster: str = ""
    """The column that says how many times faster than that."""


CACHES = {
    "cache_build": Cached(
        lambda row: f"building a store, {row['model']}, {row['precision']}" if row["extraction"] == "build" else "",
        size("images_s", " images/s"),
        "the published extraction",
        "faster",
    ),
    "cache_read": Cached(
        lambda row: f"reading, {row['store']}, {row['B']} images of {row['N']} × {row['W']}",
        size("loader_gb_s", " GB/s"),
        "a list of tensors",
        "of_list",
    ),
    "cache_disk": Cached(
        lambda row: (
            f"from the disk, {row['store_mib']} MiB with memory for {row['memory_mib']}"
            if row["way"] == "loader"
            else ""
        ),
        size("gb_s", " GB/s"),
        "the same rows by 16 threads",
        "of_threads",
    ),
    "cache_epoch": Cached(
        lambda row: f"an epoch of {row['model']} from a cold store in {row['dtype']}, {row['precision']}",
        lambda row: f"waits for {100 * float(row['share']):.2f} % of its time",
    ),
    "cache_texts": Cached(
        lambda row: f"texts of {classes(row['C'])}, {row['model']}, {row['texts']}",
        size("seconds_ready", " s until ready"),
    ),
}


def caches(device: Device) -> str:
    rows = {kind: [row for row in device.rows(kind) if cached.what(row)] for kind, cached in CACHES.items()}
    lines = [
        [cached.what(row), cached.result(row), cached.against, times(number(row, cached.faster))]
        for kind, cached in CACHES.items()
        for row in rows[kind]
    ]
    return paragraphs(table(["", "", "against", "times faster"], lines), origin(rows)) if lines else ""


# ---- where we lose, and what was wanted ------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Of ours with someone else's."""

    kind: str
    what: str
    case: str
    who: str
    faster: float
    """That many times faster is ours."""
    row: Row


# Of each kind of rows: what is compared, and the case.
COMPARED: dict[str, tuple[str, Cell]] = {
    "operators": ("`{op}`", lambda row: f"{row['shape']}, {row['dtype']}"),
    "step": ("a step", lambda row: f"{row['model']}, batch {row['B']}, {classes(row['C'])}, {row['precision']}"),
    "epoch": (
        "an epoch",
        lambda row: (
            f"{row['model']}, {row['images']} images of {classes(row['C'])}, batch {row['B']}, {row['precision']}"
        ),
    ),
    "infer": (
        "classifying",
        lambda row: (
            f"{row['model']}, {row['images']} images in batches of {row['B']}, {classes(row['C'])}, {row['precision']}"
        ),
    ),
}


def comparisons(device: Device) -> Iterator[Comparison]:
    """All that were measured; modes of ours among themselves are none."""
    for kind, (what, case) in COMPARED.items():
        for row in device.rows(kind):
            if row["faster"] and not row["who"].startswith(OURS):
                yield Comparison(kind, what.format(**row), case(row), row["who"], float(row["faster"]), row)
    for kind, cached in CACHES.items():
        for row in device.rows(kind):
            faster = number(row, cached.faster)
            if cached.what(row) and faster is not None:
                yield Comparison(kind, "the feature cache", cached.what(row), cached.against, faster, row)


def losses(device: Device, most: int | None = None) -> str:
    """Where someone else is faster, the furthest first; with `most`, no more lines than that."""
    every = list(comparisons(device))
    if not every:
        return ""
    lost = sorted((each for each in every if each.faster < 1), key=lambda each: each.faster)
    told = f"Someone else is faster in {len(lost)} of {len(every)} comparisons"
    if most is not None and len(lost) > most:
        told += f" ([all of them](docs/benchmarks.md#where-we-lose)); the {most} furthest"
    lines = [[each.what, each.case, each.who, times(each.faster)] for each in lost[:most]]
    shown = table(["", "", "who is faster", "ours, times as fast"], lines) if lines else ""
    rows: dict[str, list[Row]] = {}
    for each in every:
        rows.setdefault(each.kind, []).append(each.row)
    return paragraphs(told + (":" if lines else "."), shown, wrong(device), origin(rows))


def wrong(device: Device) -> str:
    """Cases in which an operator of ours has no time, since it is wrong or fails."""
    rows = [row for row in device.rows("operators", who=OURS) if not row["p50_ms"]]
    return "\n".join(f"- `{row['op']}`, {row['shape']}, {row['dtype']}: {row['note']}" for row in rows)


def goals(device: Device) -> str:
    """What was wanted, what was measured, and whether that is enough."""
    lines: list[list[str]] = []
    rows: dict[str, list[Row]] = {"step": [], "operators": []}
    ours = grouped(ordered(device.rows("step", who=OURS), step.WHO, "model B precision C"), "model B precision")
    for model, B, precision in ours:
        if growth := growth_of(device, model=model, B=B, precision=precision):
            what = f"a step at {MANY:,} classes, of one at {FEW}: {model}, batch {B}, {precision}"
            lines.append([what, f"≤ {GROWTH}", str(growth), met([], growth.time <= GROWTH)])
            rows["step"] += growth
    for (model, B, precision), of in ours.items():
        if measured := [row for row in of if row["above_floor"]]:
            above = {row["C"]: float(row["above_floor"]) for row in measured}
            limit = f"≤ {FLOORS[precision]}" if device.is_cpu else ""
            failed = [f"C = {int(C):,}" for C, value in above.items() if limit and not meets(value, limit)]
            what = f"a step, times its floor: {model}, batch {B}, {precision}"
            lines.append([what, limit, span(above.values()), met(failed, len(failed) < len(above)) if limit else ""])
            rows["step"] += measured
    eager = [row for row in device.rows("operators", who=EAGER) if row["wanted"] and row["faster"]]
    for (op, dtype, wanted), of in by_operator(eager, "dtype wanted"):
        failed = [row["shape"] for row in of if not meets(float(row["faster"]), wanted)]
        shapes = of[0]["shape"] if len(of) == 1 else f"{len(of)} shapes"
        what = f"`{op}`, times faster than eager: {shapes}, {dtype}"
        faster = span(float(row["faster"]) for row in of)
        lines.append([what, wanted, faster, met(failed, len(failed) < len(of))])
        rows["operators"] += of
    return paragraphs(table(["", "wanted", "measured", "met"], lines), origin(rows)) if lines else ""


def met(failed: Sequence[str], somewhere: bool) -> str:
    """In a cell: whether it is, or where not.

    >>> met([], True), met(["N1", "N2"], True), met(["N1"], False)
    ('yes', 'not at N1, N2', 'no')
    """
    return f"not at {', '.join(failed)}" if failed and somewhere else "yes" if somewhere else "no"


def meets(value: float, wanted: str) -> bool:
    """Whether a number is as wanted.

    >>> meets(1.5, "≥ 1.5"), meets(1.0, "> 1"), meets(1.7, "≤ 1.6")
    (True, False, False)
    """
    sign, limit = wanted.split()
    return {"≥": value >= float(limit), ">": value > float(limit), "≤": value <= float(limit)}[sign]


# ---- pages and pictures ----------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """What it shows, which function draws it, and from which rows."""

    title: str
    draw: Callable[[Sequence[Row]], str]
    kind: str
    where: Mapping[str, str]
    in_readme: bool = False


PICTURES = {
    "step_over_classes": Picture("a step over the number of classes", pictures.step_over_classes, "step", SHOWN, True),
    "memory_over_classes": Picture(
        "memory over the number of classes", pictures.memory_over_classes, "step", SHOWN, True
    ),
    "time_budget": Picture("where the time of a step goes", pictures.time_budget, "profile", SHOWN),
    "operator_speedups": Picture("operators against eager PyTorch", pictures.operator_speedups, "operators", {}),
}


class Report:
    """All files that are written, and what they should hold."""

    def __init__(self, root: Path = ROOT):
        self.root = root
        self.devices = devices(root / measure.RESULTS.relative_to(ROOT))
        self._svgs = {
            device.folder / f"{name}.svg": drawn(device, p) for device in self.devices for name, p in PICTURES.items()
        }

    def files(self) -> dict[Path, str]:
        """Text of each; "" for a picture that should not be there."""
        pages = {self.root / name: blocks for name, blocks in self._blocks().items()}
        return {path: filled(path, blocks) for path, blocks in pages.items()} | self._svgs

    def _blocks(self) -> dict[str, dict[str, str]]:
        """Of each page, by name."""
        few = firsts(self.devices)
        readme = {
            "headline": self._of(few, headline, "step"),
            "step": self._of(few, step_shown, "step"),
            "pictures": self._pictures(few),
            "memory": self._of(few, lambda device: memory(device, **SHOWN), "memory"),
            "infer": self._of(few, lambda device: classifying(device, model=SHOWN["model"]), "infer"),
            "glyphs": self._of(few, glyphs, "glyphs"),
            "lose": self._of(few, lambda device: losses(device, WORST), "operators"),
        }
        benchmarks = {
            "goals": self._of(self.devices, goals, "step"),
            "lose": self._of(self.devices, losses, "operators"),
            "devices": paragraphs(*map(self._section, self.devices)),
        }
        shown = {"operators": self._of(few, operators_shown, "operators")}
        return {"README.md": readme, "docs/benchmarks.md": benchmarks, "docs/operators.md": shown}

    def _of(self, shown: Sequence[Device], content: Callable[[Device], str], kind: str) -> str:
        """What there is of some devices, with their names where there are several."""
        parts = {device.name: found for device in shown if (found := content(device))}
        if not parts:
            return f"Not measured yet: `python -m {KINDS[kind].command}`."
        return paragraphs(*(f"**{name}**\n\n{found}" if len(parts) > 1 else found for name, found in parts.items()))

    def _links(self, device: Device, up: str = "") -> dict[str, str]:
        """To the pictures that there are, by name."""
        paths = {name: device.folder / f"{name}.svg" for name in PICTURES}
        return {
            name: f"[{PICTURES[name].title}]({up}{path.relative_to(self.root).as_posix()})"
            for name, path in paths.items()
            if self._svgs[path]
        }

    def _pictures(self, shown: Sequence[Device]) -> str:
        """In README.md: two of the first device, links to all others."""
        first: list[str] = []
        links = []
        for device in shown:
            found = self._links(device)
            if not first:
                first = [f"!{found.pop(name)}" for name in list(found) if PICTURES[name].in_readme]
            links.append(f"{device.name}: {', '.join(found.values())}" if found else "")
        more = "; ".join(filter(None, links))
        return paragraphs(*first, f"More: {more}." if more else "") or "Not drawn yet."

    def _section(self, device: Device) -> str:
        """Of a device in docs/benchmarks.md."""
        link = {name: f"!{found}" for name, found in self._links(device, "../").items()}
        curves = paragraphs(link.get("step_over_classes", ""), link.get("memory_over_classes", ""))
        sections = {
            "A step over the number of classes": paragraphs(curves, steps(device)),
            "An epoch": epochs(device),
            "Classifying": classifying(device),
            "A step with its update": memory(device),
            "Where the time of a step goes": paragraphs(link.get("time_budget", ""), budget(device)),
            "Operators": paragraphs(link.get("operator_speedups", ""), operators(device)),
            "The feature cache": caches(device),
        }
        found = [f"### {title}\n\n{content}" for title, content in sections.items() if content]
        return paragraphs(f"## {device.name}", *found)


def drawn(device: Device, picture: Picture) -> str:
    """The SVG, signed by what it was drawn from; "" where there is nothing to draw."""
    rows = device.rows(picture.kind, **picture.where)
    svg = picture.draw(rows) if rows else ""
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    return f"{svg.rstrip()}\n<!-- matplotlib {matplotlib.__version__}, rows {digest} -->\n" if svg else ""


def signature(svg: str) -> tuple[str, ...]:
    """By which matplotlib a picture was drawn, and from which rows."""
    found = re.search(r"<!-- matplotlib (\S+), rows (\S+) -->", svg)
    return found.groups() if found else ("", "")


def filled(page: Path, blocks: Mapping[str, str]) -> str:
    """A page with its blocks in place.

    Raises:
        ValueError: If a block has not one place, or a place no block.
    """
    content = page.read_text(encoding="utf-8")
    places = re.findall(r"<!-- bench:(\w+) -->(?=.*?<!-- /bench:\1 -->)", content, re.DOTALL)
    if sorted(places) != sorted(blocks):
        raise ValueError(f"{page}: expected a pair of comments for each of {sorted(blocks)}; got {sorted(places)}")
    for name, block in blocks.items():
        before, begin, rest = content.partition(f"<!-- bench:{name} -->")
        _, end, after = rest.partition(f"<!-- /bench:{name} -->")
        content = f"{before}{begin}\n{block}\n{end}{after}"
    return content


def up_to_date(path: Path, content: str) -> bool:
    """Whether a file holds that; a picture that another matplotlib drew need only be of the same rows."""
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    (before, rows), (now, wanted) = signature(there), signature(content)
    return rows == wanted if before != now and before and now else there == content


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args(arguments)
    stale = {path: content for path, content in Report(args.root).files().items() if not up_to_date(path, content)}
    for path, content in stale.items():
        if args.check:
            print(f"{path.relative_to(args.root)} is not up to date: python -m bench.report")
        elif content:
            path.write_text(content, encoding="utf-8")
            print(f"wrote {path.relative_to(args.root)}")
        else:
            path.unlink()
            print(f"removed {path.relative_to(args.root)}, for which there are no rows")
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
