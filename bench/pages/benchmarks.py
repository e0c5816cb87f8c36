"""Tables of docs/benchmarks.md and docs/operators.md: steps, classification, operators."""

from __future__ import annotations

from collections.abc import Sequence

from skipkernels.ops import OPERATORS

from .. import infer, step
from ..rows import PRECISIONS, Row, grouped, latest_rows, number
from .cells import MACHINE_SHOWN, SHOWN, figure, origin, table, timed, times

OURS = step.OURS


def steps() -> str:
    """Times of a step by implementation and precision, over the number of classes."""
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
    for (model, B, C, precision), of in grouped(rows, "model B C precision").items():
        found = {row["implementation"]: row for row in of}
        pair = [found.get(name, {}) for name in (step.PUBLISHED, OURS)]
        cells = [timed(row, 1, " ms") if row else "" for row in pair]
        for column in ("saved_mib", "peak_mib"):
            values = [figure(number(row, column), " MiB") for row in pair]
            cells.append(" → ".join(values) if all(values) else values[1])
        kept = f"{int(found.get(OURS, of[0])['K']):,} of {int(C):,}"
        lines.append([model, B, kept, precision, *cells])
    header = ["model", "B", "classes", "precision", *(step.PUBLISHED, OURS), "saved for backward", "rise at the peak"]
    return table(header, lines) + origin("step", rows)


def classifying() -> str:
    """Times of a classification by implementation, and of ours over its floor."""
    rows = latest_rows("infer", **MACHINE_SHOWN, model=SHOWN["model"])

    def size(row: Row) -> tuple[int, ...]:
        return int(row["images"]), int(row["B"]), int(row["C"]), PRECISIONS.index(row["precision"])

    measured = sorted((row for row in rows if row["p50_ms"]), key=size)
    lines = []
    for case, of in grouped(measured, "images B C precision").items():
        found = {row["implementation"]: row for row in of}
        floor = times(number(found.get(OURS, {}), "above_floor"))
        if infer.CACHED in found:  # starts from cached features: not the same work, so no speed-up
            found[infer.CACHED] = found[infer.CACHED] | {"faster": ""}
        cells = [timed(found[name], 1000, " s") if name in found else "" for name in infer.IMPLEMENTATIONS]
        lines.append([*case, *cells, floor])
    header = ["images", "B", "C", "precision", *infer.IMPLEMENTATIONS, f"{OURS} over its floor"]
    return table(header, lines) + origin("infer", rows)


def operators() -> str:
    """Speed-up of each shape over eager and over the fastest other implementation."""
    rows = [row for row in latest_rows("operators", **MACHINE_SHOWN) if row["op"] in OPERATORS]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))

    def fastest(of: Sequence[Row], dtype: str) -> str:
        others = [row for row in of if row["dtype"] == dtype and row["faster"] and row["implementation"] != "eager"]
        # `faster` is our speed-up over the row's implementation: the least is over the fastest.
        row = min(others, key=lambda other: float(other["faster"]), default=None)
        return f"{times(number(row, 'faster'))}, {row['implementation']}" if row else ""

    lines = []
    for (op, shape), of in sorted(grouped(rows, "op shape").items(), key=lambda item: OPERATORS.index(item[0][0])):
        eager = {row["dtype"]: times(number(row, "faster")) for row in of if row["implementation"] == "eager"}
        speed_ups = [eager.get(dtype, "") for dtype in dtypes]
        lines.append([f"`{op}`", shape, *speed_ups, *(fastest(of, dtype) for dtype in dtypes)])
    header = ["", "shape", *(f"{over}, {d}" for over in ("over eager", "over the fastest other") for d in dtypes)]
    return table(header, lines) + origin("operators", rows)
