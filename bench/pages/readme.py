"""The table of README.md, and its picture as SVG that is readable on white and on black."""

from __future__ import annotations

from typing import Any

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


def headline() -> str:
    faster, large, saved, grown, used = [], [], [], [], []
    for precision in PRECISIONS:
        published = row_of(HEADLINE, step.PUBLISHED, precision)
        ours = of_same_run(published, implementation=step.OURS)
        published_large = row_of(HEADLINE, step.PUBLISHED, precision, B=LARGE_BATCH)
        many = row_of(MANY, step.OURS, precision)
        few = of_same_run(many, C=FEW)
        faster.append(f"{times(number(published, 'faster'))} times as fast")
        large.append(f"{times(number(published_large, 'faster'))} times as fast")
        saved.append(" → ".join(figure(number(row, "saved_mib"), " MiB") for row in (published, ours)))
        time, memory = (times(float(many[column]) / float(few[column])) for column in ("p50_ms", "peak_mib"))
        grown.append(f"{time} times the time, {memory} times the memory")
        used += [published, ours, published_large, few, many]
    command = "`python -m bench.step --classes {} --implementation {}`"
    both = command.format(HEADLINE, "skipkernels published")
    lines = [
        [f"step at {int(HEADLINE):,} classes, against the published step", *faster, both],
        [f"the same with batches of {LARGE_BATCH}", *large, f"{both[:-1]} --batch {LARGE_BATCH}`"],
        ["saved for backward, the published step → ours", *saved, both],
        [f"our step at {int(MANY):,} classes, against {FEW}", *grown, command.format(f"{FEW} {MANY}", "skipkernels")],
    ]
    return table(["", *PRECISIONS, "command"], lines) + origin("step", used)


def step_bars() -> str:
    """Bars of time and saved bytes of a step in fp32."""
    rows = latest_rows("step", **SHOWN, precision="fp32")
    found = {(row["implementation"], int(row["C"])): row for row in rows if int(row["C"]) in DRAWN}
    names = (step.OURS, step.PUBLISHED, step.PROMPTS, step.FULL)
    colours = dict(zip(names, COLOURS, strict=True))

    def draw(column: str, title: str, axes: Axes) -> None:
        unit, digits = (1024, 2) if column == "saved_mib" else (1000, 1)
        largest = max(number(found[name, classes], column) or 0 for name in names for classes in DRAWN)
        ticks = []
        for group, classes in enumerate(DRAWN):
            for place, name in enumerate(names):
                y, value = group * (len(names) + 1) + place, number(found[name, classes], column)
                axes.barh(y, value or 0, color=colours[name], height=0.8, label="" if group else name)
                text = "does not fit in memory" if value is None else f"{value / unit:.{digits}f}"
                axes.text((value or 0) + 0.015 * largest, y, text, va="center", fontsize=8.5, color=GREY)
            ticks.append(group * (len(names) + 1) + (len(names) - 1) / 2)
        axes.set_yticks(ticks, [f"{classes:,}\nclasses" for classes in DRAWN])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * largest)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title, color=GREY, fontsize=10)

    def both(canvas: Figure) -> None:
        left, right = canvas.subplots(1, 2)
        draw("p50_ms", "a training step, seconds", left)
        draw("saved_mib", "saved for backward, GiB", right)
        where: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False}
        canvas.legend(*right.get_legend_handles_labels(), **where, labelcolor=GREY, fontsize=9)

    return svg_of("bars", "time and memory of a step at 100 and at 1,000 classes", both, size=(9.6, 3.4))
