"""The table of README.md, and its picture as SVG that is readable on white and on black."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import step
from ..rows import PRECISIONS, Row, all_rows, latest_rows, number, same_run
from .cells import MACHINE_SHOWN, SHOWN, figure, origin, table, times
from .svg import COLOURS, GREY, svg_of

HEADLINE, FEW, MANY = "1000", "10", "21841"  # classes
LARGE_BATCH = "32"
DRAWN = 100, 1000  # classes of the picture


def row_of(C: str, implementation: str, precision: str, **changes: str) -> Row:
    """The row of a step that counts."""
    (row,) = latest_rows("step", **SHOWN | changes, C=C, implementation=implementation, precision=precision)
    return row


def of_same_run(row: Row, **changes: str) -> Row:
    """The step of another case that ran with `row`."""
    found = same_run(all_rows("step", **MACHINE_SHOWN), row, **changes)
    assert found is not None, f"no step with {changes} in the run of {row}"
    return found


class Steps(NamedTuple):
    """The steps of a precision that the table compares."""

    published: Row
    ours: Row
    published_large: Row
    few: Row
    many: Row

    @property
    def saved(self) -> str:
        """Bytes saved by the published step, and by ours."""
        return " → ".join(figure(number(row, "saved_mib"), " MiB") for row in (self.published, self.ours))

    @property
    def growth(self) -> str:
        """Time and memory of our step with many classes, over those with few."""
        time, memory = (times(float(self.many[c]) / float(self.few[c])) for c in ("p50_ms", "peak_mib"))
        return f"{time} times the time, {memory} times the memory"


def steps_of(precision: str) -> Steps:
    """The rows of the table in a precision."""
    published, many = row_of(HEADLINE, step.PUBLISHED, precision), row_of(MANY, step.OURS, precision)
    return Steps(
        published=published,
        ours=of_same_run(published, implementation=step.OURS),
        published_large=row_of(HEADLINE, step.PUBLISHED, precision, B=LARGE_BATCH),
        few=of_same_run(many, C=FEW),
        many=many,
    )


def headline() -> str:
    """The table of README.md."""
    of = [steps_of(precision) for precision in PRECISIONS]

    def speed_ups(rows: Iterable[Row]) -> list[str]:
        return [f"{times(number(row, 'faster'))} times as fast" for row in rows]

    both = f"python -m bench.step --classes {HEADLINE} --implementation skipkernels published"
    ours = f"python -m bench.step --classes {FEW} {MANY} --implementation skipkernels"
    size, large = f"step at {int(HEADLINE):,} classes, against the published step", f"{both} --batch {LARGE_BATCH}"
    lines = [
        [size, *speed_ups(steps.published for steps in of), f"`{both}`"],
        [f"the same with batches of {LARGE_BATCH}", *speed_ups(steps.published_large for steps in of), f"`{large}`"],
        ["saved for backward, the published step → ours", *(steps.saved for steps in of), f"`{both}`"],
        [f"our step at {int(MANY):,} classes, against {FEW}", *(steps.growth for steps in of), f"`{ours}`"],
    ]
    used = itertools.chain.from_iterable(of)
    return table(["", *PRECISIONS, "command"], lines) + origin("step", list(used))


class Bars(NamedTuple):
    """A column of rows as bars: title, divisor of the values, and digits after the point."""

    column: str
    title: str
    divisor: int
    digits: int


TIME = Bars("p50_ms", "a training step, seconds", 1000, 1)
SAVED = Bars("saved_mib", "saved for backward, GiB", 1024, 2)
NAMES = (step.OURS, step.PUBLISHED, step.PROMPTS, step.FULL)  # of the bars


def step_bars() -> str:
    """Bars of time and saved bytes of a step in fp32."""
    rows = latest_rows("step", **SHOWN, precision="fp32")
    found = {(row["implementation"], int(row["C"])): row for row in rows if int(row["C"]) in DRAWN}

    def draw(canvas: Figure) -> None:
        left, right = canvas.subplots(1, 2)
        draw_bars(left, found, TIME)
        draw_bars(right, found, SAVED)
        where: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}
        canvas.legend(*right.get_legend_handles_labels(), **where, labelcolor=GREY, fontsize=9)

    return svg_of("bars", "time and memory of a step at 100 and at 1,000 classes", draw, size=(9.6, 3.4))


def draw_bars(axes: Axes, rows: dict[tuple[str, int], Row], bars: Bars) -> None:
    """Draw a group of bars for each number of classes."""
    values = {case: number(row, bars.column) for case, row in rows.items()}
    largest = max(values[name, classes] or 0 for name in NAMES for classes in DRAWN)
    ticks = []
    for group, classes in enumerate(DRAWN):
        first = group * (len(NAMES) + 1)
        for y, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True), start=first):
            value = values[name, classes]
            axes.barh(y, value or 0, color=colour, height=0.8, label="" if group else name)
            text = "does not fit in memory" if value is None else f"{value / bars.divisor:.{bars.digits}f}"
            axes.text((value or 0) + 0.015 * largest, y, text, va="center", fontsize=8.5, color=GREY)
        ticks.append(first + (len(NAMES) - 1) / 2)
    axes.set_yticks(ticks, [f"{classes:,}\nclasses" for classes in DRAWN])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * largest)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(bars.title, color=GREY, fontsize=10)
