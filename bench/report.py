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
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

from skipkernels.experiments.studies.runs import spread

from . import epoch, infer, measure, pictures, step
from .markdown import (
    Cell,
    case_of,
    classes,
    count,
    figure,
    folded,
    listed,
    origin,
    paragraphs,
    quantiles,
    ratio,
    size,
    span,
    table,
    text,
    times,
)
from .pictures import PRECISIONS, Row, number
from .stored import KINDS, Device, beside, by_operator, devices, firsts, grouped, ordered

ROOT = Path(__file__).parents[1]
OURS, EAGER = step.OURS, "eager"

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
        there = next(iter(device.rows("step", **case, C=str(MANY), who=step.PUBLISHED)), {"note": ""})
        limit = "; the published one does not fit" if there["note"].startswith("does not fit") else ""
        grown.append(f"{growth}{limit}" if growth else "")
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
        return " / ".join(filter(None, (size("saved_mib")(row), size("peak_mib")(row))))

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
EPOCH |= {"ours is faster, times": ratio("faster"), "mean loss": text("loss")}
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
