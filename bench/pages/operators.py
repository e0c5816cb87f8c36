"""Table of docs/operators.md: operators against their peers."""

from __future__ import annotations

from collections.abc import Sequence

from skipkernels.ops import OPERATORS

from ..rows import Row, grouped, latest_rows, number
from .cells import MACHINE_SHOWN, origin, table, times

EAGER = "eager"


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
        speed_ups = [eager.get(dtype, "") for dtype in dtypes]
        lines.append([f"`{op}`", shape, *speed_ups, *(fastest(of, dtype) for dtype in dtypes)])
    header = ["", "shape", *(f"{over}, {d}" for over in ("over eager", "over the fastest other") for d in dtypes)]
    return table(header, lines) + origin("operators", rows)
