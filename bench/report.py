"""Write the tables of README.md and docs/, and their pictures, from stored rows.

    python -m bench.report            write the pages that are out of date, and the pictures
    python -m bench.report --check    write nothing; exit 1 and name the pages that are out of date

A pair of comments, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, marks the place of each table. Shown are the first
GPU, if there is one, and the first CPU. A ratio is always one that was measured within a run (`rows.py` says which row
of a case counts).
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean

from skipkernels.ops import OPERATORS

from . import gpu_model, infer, paper_cost, pictures, step, tables, unknown
from .rows import KINDS, MACHINE, PRECISIONS, Device, Row, devices, grouped, number, of_all_devices, same_run
from .when import summary

ROOT = Path(__file__).parents[1]
OURS, EAGER = step.OURS, "eager"
SHOWN = {"model": "ViT-B-16", "B": "4"}  # the steps in tables and pictures
HEADLINE, FEW, MANY = "1000", "10", "21841"  # classes
LARGE_BATCH = "32"
CLAIMED, EVALUATION = ("100", "1000"), {"model": "ViT-B-16", "images": "100", "B": "100"}  # of the claims
TRAINERS = {"accelerate": "accelerate", "hugging_face": "Hugging Face Trainer"}
PARTS = {"image": "image tower", "pairs": "both towers on pairs"}
FUSED = {"checkpointing": "gradient checkpointing", "compile": "torch.compile"}
FUSED |= {f"fuse-{memory}": f"sk.fuse, {memory}" for memory in ("fast", "balanced", "min")}
TRAINERS |= {"lightning": "Lightning", "open_clip": "open_clip's trainer"}
PICTURES = {"step_bars": pictures.step_bars, "step_over_classes": pictures.step_over_classes}


# ---- cells and tables ------------------------------------------------------------------------------------------------


def figure(value: float | None, unit: str = "") -> str:
    """Three significant digits, or all digits before the point.

    >>> figure(0.2714), figure(12.71, " ms"), figure(48188.4), figure(None, " ms")
    ('0.271', '12.7 ms', '48,188', '')
    """
    if value is None:
        return ""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0}f}{unit}"


def times(value: float | None) -> str:
    """A ratio, in bold if it is below 1.

    >>> times(2.444), times(38.21), times(0.63), times(0.9971), times(None)
    ('2.44', '38.2', '**0.63**', '**0.997**', '')
    """
    if value is None:
        return ""
    if value < 1:
        return f"**{value:.{3 if value >= 0.995 else 2}f}**"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def timed(row: Row, divisor: float = 1, unit: str = "") -> str:
    """Milliseconds and, in brackets, our speed-up; without a measurement, the reason."""
    if not row["p50_ms"]:
        about = re.search(r"about [\d.]+ s", row["note"])
        reason = "not run" if row["note"].startswith("left out") else row["note"].split(":")[0]
        return f"{reason}: {about[0]}" if about and reason == "not run" else reason
    faster = times(number(row, "faster"))
    return figure(float(row["p50_ms"]) / divisor, unit) + (f" ({faster})" if faster else "")


def saving(row: Row, first: Row, column: str, divisor: float = 1, unit: str = "") -> str:
    """A value and, in brackets, how much less it is than in the first row of the same run; without a value, the reason.

    >>> run = dict.fromkeys(MACHINE, "")
    >>> saving(run | {"s": "63"}, run | {"s": "100"}, "s"), saving(run | {"s": "126"}, run | {"s": "100"}, "s", 2, " s")
    ('63.0 (37 % less)', '63.0 s (26 % more)')
    """
    value, other = number(row, column), number(first, column)
    if value is None:
        return row.get("note", "").partition(":")[0]
    if row is first or other is None or any(row[name] != first[name] for name in MACHINE):
        return figure(value / divisor, unit)
    change = 100 * value / other - 100
    return f"{figure(value / divisor, unit)} ({abs(change):.0f} % {'more' if change > 0 else 'less'})"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table without its empty columns."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    kept = [i for i in range(len(header)) if i == 0 or any(line[i] for line in cells)]
    return "\n".join(f"| {' | '.join(line[i] for i in kept)} |" for line in [header, ["---"] * len(header), *cells])


def origin(kind: str, rows: Sequence[Row]) -> str:
    """The line below a table: device, versions and commits of the measured rows, and commands, of one or more kinds."""
    columns = [KINDS[each].measured for each in kind.split()]
    measured = [row for row in rows if any(row.get(column) for column in columns)] or rows

    def values(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in measured))

    machine = f"{values('device')}, {values('threads')} threads; torch {values('torch')}"
    commands = ", ".join(f"`python -m {KINDS[each].command}`" for each in kind.split())
    return f"\n\n<sub>{machine}; commit {values('commit')}; {commands}</sub>"


# ---- README ----------------------------------------------------------------------------------------------------------


def few_and_many(device: Device, **case: str) -> tuple[Row, Row] | None:
    """Our step at FEW and at MANY classes, both of one commit."""
    for many in device.latest_rows("step", **case, implementation=OURS, C=MANY):
        if (few := same_run(device.all_rows("step"), many, C=FEW)) and many["p50_ms"]:
            return few, many
    return None


def growth(few: Row, many: Row) -> tuple[float, float | None]:
    """Time and peak memory of a step over those of another."""
    peaks = number(many, "peak_mib"), number(few, "peak_mib")
    return float(many["p50_ms"]) / float(few["p50_ms"]), peaks[0] / peaks[1] if peaks[0] and peaks[1] else None


def headline(device: Device) -> str:
    faster, large, saved, grown, used = [], [], [], [], []
    for precision in PRECISIONS:
        case = SHOWN | {"precision": precision}
        published, published_large = (
            next(iter(device.latest_rows("step", **case | {"B": B}, C=HEADLINE, implementation=step.PUBLISHED)), None)
            for B in (SHOWN["B"], LARGE_BATCH)
        )
        large.append(f"{times(number(published_large, 'faster'))} times as fast" if published_large else "")
        ours = same_run(device.all_rows("step"), published, implementation=OURS) if published else None
        pair = [published, ours] if published and ours else []
        faster.append(f"{times(number(pair[0], 'faster'))} times as fast" if pair else "")
        saved.append(" → ".join(figure(number(row, "saved_mib"), " MiB") for row in pair))
        ends = few_and_many(device, **case)
        ratios = [times(ratio) for ratio in growth(*ends)] if ends else []
        grown.append(f"{ratios[0]} times the time, {ratios[1]} times the memory" if ratios else "")
        used += [*pair, *([published_large] if published_large else []), *(ends or ())]
    command = "`python -m bench.step --classes {} --implementation {}`"
    both = command.format(HEADLINE, "skipkernels published")
    lines = [
        [f"step at {int(HEADLINE):,} classes, against the published step", *faster, both],
        [f"the same with batches of {LARGE_BATCH}", *large, f"{both[:-1]} --batch {LARGE_BATCH}`"],
        ["saved for backward, the published step → ours", *saved, both],
        [f"our step at {int(MANY):,} classes, against {FEW}", *grown, command.format(f"{FEW} {MANY}", "skipkernels")],
    ]
    return table(["", *PRECISIONS, "command"], lines) + origin("step", used) if used else ""


def steps(device: Device) -> str:
    rows = device.latest_rows("step", **SHOWN)
    if not rows:
        return ""
    by_case = {(row["implementation"], row["precision"], row["C"]): row for row in rows}
    columns = sorted({row["C"] for row in rows}, key=int)
    kept = [next((row["K"] for row in rows if row["C"] == C and row["implementation"] == OURS), "") for C in columns]
    lines = [["kept classes K, ours", "", *(f"{int(K):,}" if K else "" for K in kept)]]
    for precision in PRECISIONS:
        for name in step.IMPLEMENTATIONS:
            found = [by_case.get((name, precision, C)) for C in columns]
            if any(found):
                lines.append([name, precision, *(timed(row) if row else "" for row in found)])
    return table(["", "", *(f"C = {int(C):,}" for C in columns)], lines) + origin("step", rows)


def sizes(device: Device) -> str:
    """The published step and ours with other models and batch sizes."""
    rows = [row for row in device.latest_rows("step") if not SHOWN.items() <= row.items()]
    lines = []
    for case, of in grouped(rows, "model B C precision").items():
        found = {row["implementation"]: row for row in of}
        pair = [found.get(name, {}) for name in (step.PUBLISHED, OURS)]
        cells = [timed(row, 1, " ms") if row else "" for row in pair]
        for column in ("saved_mib", "peak_mib"):
            values = [figure(number(row, column), " MiB") for row in pair]
            cells.append(" → ".join(values) if all(values) else values[1])
        kept = f"{int(found.get(OURS, of[0])['K']):,} of {int(case[2]):,}"
        lines.append([*case[:2], kept, case[3], *cells])
    header = ["model", "B", "classes", "precision", *(step.PUBLISHED, OURS), "saved for backward", "rise at the peak"]
    return table(header, lines) + origin("step", rows) if rows else ""


def memory(device: Device) -> str:
    rows = device.latest_rows("memory", **SHOWN)
    lines = [
        [
            f"`{row['optimizer']}`" + (f', `memory="{row["memory"]}"`' if row["memory"] != "fast" else ""),
            row["precision"],
            f"{int(row['K']):,} of {int(row['C']):,}",
            figure(number(row, "p50_ms"), " ms"),
            *(figure(number(row, column), " MiB") for column in ("saved_mib", "gradients_mib", "peak_mib")),
        ]
        for row in rows
    ]
    header = ["", "precision", "classes", "step", "saved for backward", "largest sum of gradients"]
    return table([*header, "peak above the memory between steps"], lines) + origin("memory", rows) if rows else ""


def classifying(device: Device) -> str:
    rows = device.latest_rows("infer", model=SHOWN["model"])
    cases = sorted(
        grouped((row for row in rows if row["p50_ms"]), "images B C precision").items(),
        key=lambda item: (*map(int, item[0][:3]), PRECISIONS.index(item[0][3])),
    )
    lines = []
    for case, of in cases:
        found = {row["implementation"]: row for row in of}
        floor = times(number(found.get(OURS, {}), "above_floor"))
        if infer.CACHED in found:  # starts from cached features: not the same work, so no speed-up
            found[infer.CACHED] = found[infer.CACHED] | {"faster": ""}
        cells = [timed(found[name], 1000, " s") if name in found else "" for name in infer.IMPLEMENTATIONS]
        lines.append([*case, *cells, floor])
    header = ["images", "B", "C", "precision", *infer.IMPLEMENTATIONS, f"{OURS} over its floor"]
    return table(header, lines) + origin("infer", rows) if rows else ""


def claims(device: Device) -> str:
    """Memory of training and time of classification, and how much less they are than those of the first line."""
    used, lines = [], []
    for what, kind, where, names, column, divisor, unit in (
        ("training", "step", SHOWN, (step.FULL, step.PUBLISHED, OURS), "training_mib", 1, " MiB"),
        ("classification", "infer", EVALUATION, (step.PUBLISHED, OURS), "p50_ms", 1000, " s"),
    ):
        rows = [row for row in device.all_rows(kind) if where.items() <= row.items() and row["C"] in CLAIMED]
        measured = [row for row in rows if row["implementation"] in names and row.get(column)]
        rows = [row for row in rows if row in measured or row["note"].startswith("does not fit")]
        by_case = {(row["implementation"], row["precision"], row["C"]): row for row in rows}
        for precision, name in itertools.product(PRECISIONS if measured else (), names):
            found = [[by_case.get((each, precision, C), {}) for C in CLAIMED] for each in (name, names[0])]
            cells = [saving(*pair, column, divisor, unit) for pair in zip(*found, strict=True)]
            lines.append([f"{what}, {name}", precision, *cells])
        used += [row for row in by_case.values() if row in measured]
    header = ["", "", *(f"C = {int(C):,}" for C in CLAIMED)]
    return table(header, [line for line in lines if any(line[2:])]) + origin("step infer", used) if used else ""


def paper(device: Device) -> str:
    """The paper's memory column, the same by formula, and the peaks that were measured at about as many classes."""
    rows = [row for row in device.all_rows("step") if SHOWN.items() <= row.items() and row.get("training_mib")]
    used: dict[tuple[str, ...], Row] = {(r["C"], r["implementation"]): r for r in rows if r["precision"] == "bf16"}
    lines = []
    for cost in paper_cost.costs():
        C = CLAIMED["classes" in cost.protocol] if cost.method == "Skip Tuning, λ = 0.3" else ""  # as measured
        peaks = [number(used.get((C, name), {}), "training_mib") for name in (step.PUBLISHED, OURS)]
        published, formula = (f"{value:,.0f}" for value in (cost.published, cost.megabytes))
        lines.append([cost.method, cost.protocol, published, formula, *(figure(peak, " MiB") for peak in peaks)])
    header = ["", "protocol", "published", "by formula", "measured peak, published step", "measured peak, ours"]
    shown = [row for (C, name), row in used.items() if C in CLAIMED and name in (step.PUBLISHED, OURS)]
    return table(header, lines) + origin("step", shown) if shown else ""


def trainers(device: Device) -> str:
    rows = device.latest_rows("trainers", **SHOWN)
    lines = []
    for (trainer,), of in grouped(rows, "trainer").items():
        pair = [row for name in ("naive", OURS) for row in of if row["implementation"] == name]
        step, saved = ([float(row[column]) for row in pair] for column in ("p50_ms", "saved_mib"))
        cells = [" → ".join(figure(x, unit) for x in values) for values, unit in ((step, " ms"), (saved, " MiB"))]
        lines.append([TRAINERS[trainer], pair[-1]["lines"], cells[0], times(step[0] / step[1]), cells[1]])
    header = ["trainer", "lines", "step, plain → ours", "speed-up", "saved for backward, plain → ours"]
    return table(header, lines) + origin("trainers", rows) if rows else ""


def fused(device: Device) -> str:
    """Saved bytes and time of training a whole model, relative to its own blocks; models ran on several CPUs."""
    if not device.is_cpu:
        return ""
    rows, lines = of_all_devices(device.folder.parent, "fuse"), []
    for (model, batch, part), of in grouped(rows, "model B part").items():
        found = {row["implementation"]: (float(row["saved_mib"]), float(row["p50_ms"])) for row in of}
        saved, step = found[EAGER]
        cells = [
            f"{found[name][0] / saved:.2f}, {found[name][1] / step:.2f}" if name in found else "–" for name in FUSED
        ]
        lines.append([f"{model}, batch {batch}, {PARTS[part]}", *cells])
    return table(["bytes, time", *FUSED.values()], lines) + origin("fuse", rows) if rows else ""


def when(device: Device, name: str) -> str:
    """A table of the study of when Skip Tuning wins, which ran on several CPUs."""
    if not device.is_cpu:
        return ""
    study = summary.Study(*(of_all_devices(device.folder.parent, kind) for kind in summary.Study._fields))
    _, kind, make = summary.TABLES[name]
    rows = getattr(study, kind)
    return table(*make(study)) + origin(kind, rows) if rows else ""


def estimates(device: Device) -> str:
    """Estimated steps on a GPU, which depend on no device here."""
    if not device.is_cpu:
        return ""
    header, lines = gpu_model.cells(tables.read(gpu_model.TABLE, gpu_model.Row))
    return table(header, lines) + f"\n\n<sub>{gpu_model.TITLE}; `python -m bench.gpu_model`</sub>"


def unknown_scores(device: Device) -> str:
    """Scores that tell unknown images from known ones: means over tasks and seeds."""
    if not device.is_cpu:
        return ""
    of = tables.read(unknown.SCORES_TABLE, unknown.Score)
    lines = []
    for name in dict.fromkeys(row.score for row in of):
        rows = {kind: [row for row in of if (row.score, row.unknown) == (name, kind)] for kind in unknown.UNKNOWN}
        cells = [f"{mean(float(row.auroc) for row in found):.2f}" for found in rows.values()]
        kept = [f"{mean(float(row.unknown_kept) for row in found):.0f} %" for found in rows.values()]
        lines.append([name, *cells, *kept, f"{mean(float(row.right) for row in of if row.score == name):.2f}"])
    header = ["score", *(f"AUROC, {kind}" for kind in unknown.UNKNOWN)]
    header += [*(f"{kind} kept" for kind in unknown.UNKNOWN), "AUROC, right and wrong"]
    return table(header, lines) + "\n\n<sub>pictogram-tiny, 5 tasks, 3 seeds; `python -m bench.unknown`</sub>"


def unknown_thresholds(device: Device) -> str:
    """Images that thresholds keep: means over tasks and seeds."""
    if not device.is_cpu:
        return ""
    of = tables.read(unknown.THRESHOLDS_TABLE, unknown.Kept)
    columns = ("threshold", "validation", "known", "accuracy", "new_classes", "other_tasks")
    lines = []
    for target in dict.fromkeys(row.target for row in of):
        found = [row for row in of if row.target == target and row.threshold]
        means = [mean(float(getattr(row, column)) for row in found) for column in columns]
        lines.append([f"{target} %", f"{means[0]:.2f}", *(f"{value:.0f} %" for value in means[1:])])
    header = ["accuracy wanted", "threshold", "validation images kept", "test images kept", "right of these"]
    return table([*header, *(f"{kind} kept" for kind in unknown.UNKNOWN)], lines)


# ---- operators and losses ----------------------------------------------------------------------------------------


def operators(device: Device) -> str:
    """Speed-up of each shape over eager and over the fastest other implementation."""
    rows = [row for row in device.latest_rows("operators") if row["op"] in OPERATORS]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))

    def fastest(of: Sequence[Row], dtype: str) -> str:
        others = [row for row in of if row["dtype"] == dtype and row["faster"] and row["implementation"] != EAGER]
        row = min(others, key=lambda other: float(other["faster"]), default=None)
        return f"{times(number(row, 'faster'))}, {row['implementation']}" if row else ""

    lines = []
    for (op, shape), of in sorted(grouped(rows, "op shape").items(), key=lambda item: OPERATORS.index(item[0][0])):
        eager = {row["dtype"]: times(number(row, "faster")) for row in of if row["implementation"] == EAGER}
        goal = ", ".join(dict.fromkeys(row["wanted"] for row in of if row["wanted"]))
        speed_ups = [eager.get(dtype, "") for dtype in dtypes]
        lines.append([f"`{op}`", shape, *speed_ups, goal, *(fastest(of, dtype) for dtype in dtypes)])
    header = ["", "shape", *(f"over eager, {d}" for d in dtypes), "goal"]
    header += [f"over the fastest other, {d}" for d in dtypes]
    return table(header, lines) + origin("operators", rows) if rows else ""


# For each kind of rows: the column with our speed-up, what is compared, and against what.
COMPARED = {
    "operators": ("faster", "`{op}`, {shape}, {dtype}", "{implementation}"),
    "step": ("faster", "a step, {model}, B{B}, C{C}, {precision}", "{implementation}"),
    "infer": ("faster", "classifying {images} images, {model}, C{C}, {precision}", "{implementation}"),
    "cache_build": ("faster", "building a cache, {model}, {precision}", "published"),
}


def losses(device: Device) -> str:
    """Comparisons in which another implementation is faster, the largest factor first."""
    every = [
        (float(row[column]), what.format(**row), against.format(**row))
        for kind, (column, what, against) in COMPARED.items()
        for row in device.latest_rows(kind)
        if row.get(column) and not row.get("implementation", "").startswith(OURS)
        if row.get("extraction", "build") == "build" and row.get("way", "loader") == "loader"
    ]
    lost = sorted(each for each in every if each[0] < 1)
    if not every:
        return ""
    text = f"Another implementation is faster in {len(lost)} of {len(every)} comparisons"
    failed = [row for row in device.latest_rows("operators", implementation=OURS) if not row["p50_ms"]]
    notes = "".join(f"\n\n- `{row['op']}`, {row['shape']}, {row['dtype']}: {row['note']}" for row in failed)
    lines = [[what, against, times(faster)] for faster, what, against in lost]
    return f"{text}:\n\n" + table(["", "faster", "our speed-up"], lines) + notes if lost else f"{text}.{notes}"


# ---- pages -----------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, dict[str, Callable[[Device], str]]] = {
    "README.md": {"headline": headline},
    "docs/benchmarks.md": {"step": steps, "sizes": sizes, "memory": memory, "infer": classifying, "claims": claims}
    | {"paper": paper, "lose": losses},
    "docs/operators.md": {"operators": operators},
    "docs/gpu.md": {"gpu-model": estimates},
    "docs/using-a-model.md": {"unknown": unknown_scores, "unknown-thresholds": unknown_thresholds},
    "docs/when.md": {f"when-{name}": partial(when, name=name) for name in ("harmonic", "differences", "base", "new")},
    "docs/when-details.md": {f"when-{name}": partial(when, name=name) for name in ("settings", "cost", "steps")},
    "docs/trainers.md": {"trainers": trainers},
    "docs/fused-blocks.md": {"fuse": fused},
}


def files(root: Path) -> dict[Path, str]:
    """The text that each page must have."""
    found = devices(root / "bench" / "results")
    first = {device.is_cpu: device for device in reversed(found)}
    shown = [first[is_cpu] for is_cpu in (False, True) if is_cpu in first]
    texts: dict[Path, str] = {}
    for page, blocks in BLOCKS.items():
        texts[root / page] = (root / page).read_text(encoding="utf-8")
        for name, block in blocks.items():
            parts = {device.name: text for device in shown if (text := block(device))}
            text = "\n\n".join(f"**{device}**\n\n{t}" if len(parts) > 1 else t for device, t in parts.items())
            texts[root / page] = filled(texts[root / page], name, text or "Not measured yet.")
    return texts


def drawn(root: Path) -> dict[Path, str]:
    """The pictures of the first device."""
    found = {}
    for device in devices(root / "bench" / "results")[:1]:
        rows = device.latest_rows("step", **SHOWN)
        found = {device.folder / f"{name}.svg": draw(rows) for name, draw in PICTURES.items()}
    return {path: svg for path, svg in found.items() if svg}


def filled(page: str, name: str, block: str) -> str:
    """A page with one block replaced.

    Raises:
        ValueError: If the page does not have exactly one place for the block.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"bench.report: a page must have {begin} and {end} once; got {page.count(begin)}.")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args(arguments)
    stale = {path: text for path, text in files(args.root).items() if path.read_text(encoding="utf-8") != text}
    if args.check:
        for path in stale:
            print(f"{path.relative_to(args.root)} is out of date: python -m bench.report")
        return int(bool(stale))
    for path, text in (stale | drawn(args.root)).items():
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(args.root)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
