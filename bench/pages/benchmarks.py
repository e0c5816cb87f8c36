"""Tables of docs/benchmarks.md: steps, classification, claims of the paper, and comparisons that we lose."""

from __future__ import annotations

import itertools

from .. import infer, step
from ..rows import PRECISIONS, all_rows, grouped, latest_rows, number
from .cells import MACHINE_SHOWN, SHOWN, figure, origin, saving, table, timed, times

OURS = step.OURS
CLAIMED, EVALUATION = ("100", "1000"), SHOWN | {"images": "100", "B": "100"}  # of the claims


def steps() -> str:
    rows = latest_rows("step", **SHOWN)
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


def sizes() -> str:
    """The published step and ours with other models and batch sizes."""
    rows = [row for row in latest_rows("step", **MACHINE_SHOWN) if not SHOWN.items() <= row.items()]
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
    return table(header, lines) + origin("step", rows)


def memory() -> str:
    rows = latest_rows("memory", **SHOWN)
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
    return table([*header, "peak above the memory between steps"], lines) + origin("memory", rows)


def classifying() -> str:
    rows = latest_rows("infer", **MACHINE_SHOWN, model=SHOWN["model"])
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
    return table(header, lines) + origin("infer", rows)


def claims() -> str:
    """Memory of training and time of classification, and how much less they are than those of the first line."""
    used, lines = [], []
    for what, kind, where, names, column, divisor, unit in (
        ("training", "step", SHOWN, (step.FULL, step.PUBLISHED, OURS), "training_mib", 1, " MiB"),
        ("classification", "infer", EVALUATION, (step.PUBLISHED, OURS), "p50_ms", 1000, " s"),
    ):
        rows = [row for row in all_rows(kind, **where) if row["C"] in CLAIMED]
        measured = [row for row in rows if row["implementation"] in names and row.get(column)]
        rows = [row for row in rows if row in measured or row["note"].startswith("does not fit")]
        by_case = {(row["implementation"], row["precision"], row["C"]): row for row in rows}
        for precision, name in itertools.product(PRECISIONS, names):
            found = [[by_case.get((each, precision, C), {}) for C in CLAIMED] for each in (name, names[0])]
            cells = [saving(*pair, column, divisor, unit) for pair in zip(*found, strict=True)]
            lines.append([f"{what}, {name}", precision, *cells])
        used += [row for row in by_case.values() if row in measured]
    header = ["", "", *(f"C = {int(C):,}" for C in CLAIMED)]
    return table(header, [line for line in lines if any(line[2:])]) + origin("step infer", used)


# For each kind of rows: the column with our speed-up, what is compared, and against what.
COMPARED = {
    "operators": ("faster", "`{op}`, {shape}, {dtype}", "{implementation}"),
    "step": ("faster", "a step, {model}, B{B}, C{C}, {precision}", "{implementation}"),
    "infer": ("faster", "classifying {images} images, {model}, C{C}, {precision}", "{implementation}"),
    "cache_build": ("faster", "building a cache, {model}, {precision}", "published"),
}


def losses() -> str:
    """Comparisons in which another implementation is faster, the largest factor first."""
    every = [
        (float(row[column]), what.format(**row), against.format(**row))
        for kind, (column, what, against) in COMPARED.items()
        for row in latest_rows(kind, **MACHINE_SHOWN)
        if row.get(column) and not row.get("implementation", "").startswith(OURS)
        if row.get("extraction", "build") == "build"
    ]
    lost = sorted(each for each in every if each[0] < 1)
    text = f"Another implementation is faster in {len(lost)} of {len(every)} comparisons"
    lines = [[what, against, times(faster)] for faster, what, against in lost]
    return f"{text}:\n\n" + table(["", "faster", "our speed-up"], lines)
