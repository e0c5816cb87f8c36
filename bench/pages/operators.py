"""Tables of docs/operators.md and docs/trainers.md: operators and trainers against their peers."""

from __future__ import annotations

from collections.abc import Sequence

from skipkernels.ops import OPERATORS

from ..measure import OURS
from ..rows import Row, grouped, latest_rows, number
from .cells import MACHINE_SHOWN, SHOWN, figure, origin, table, times

EAGER = "eager"
TRAINERS = {
    "accelerate": "accelerate",
    "hugging_face": "Hugging Face Trainer",
    "lightning": "Lightning",
    "open_clip": "open_clip's trainer",
}


def operators() -> str:
    """Speed-up of each shape over eager and over the fastest other implementation."""
    rows = [row for row in latest_rows("operators", **MACHINE_SHOWN) if row["op"] in OPERATORS]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))

    def fastest(of: Sequence[Row], dtype: str) -> str:
        others = [row for row in of if row["dtype"] == dtype and row["faster"] and row["implementation"] != EAGER]
        # `faster` is our speed-up over the row's implementation: the least is over the fastest.
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
    return table(header, lines) + origin("operators", rows)


def trainers() -> str:
    """Step and saved memory of the plain module and ours in each trainer.

    Raises:
        ValueError: If a trainer has not exactly two rows, as with another number of classes.
    """
    rows = latest_rows("trainers", **SHOWN, precision="fp32")
    lines = []
    for (trainer,), of in grouped(rows, "trainer").items():
        found = {row["implementation"]: row for row in of}
        if len(of) != 2 or found.keys() != {"naive", OURS}:
            raise ValueError(f"trainers: {trainer} must have a row of naive and one of {OURS}; got {len(of)} rows.")
        step, saved = ([float(found[name][column]) for name in ("naive", OURS)] for column in ("p50_ms", "saved_mib"))
        cells = [" → ".join(figure(x, unit) for x in values) for values, unit in ((step, " ms"), (saved, " MiB"))]
        lines.append([TRAINERS[trainer], cells[0], times(step[0] / step[1]), cells[1]])
    header = ["trainer", "step, plain → ours", "speed-up", "saved for backward, plain → ours"]
    return table(header, lines) + origin("trainers", rows)
