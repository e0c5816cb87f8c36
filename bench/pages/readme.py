"""The table of README.md."""

from __future__ import annotations

from .. import step
from ..rows import PRECISIONS, Row, all_rows, latest_rows, number, same_run
from .cells import MACHINE_SHOWN, SHOWN, figure, origin, table, times

HEADLINE, FEW, MANY = "1000", "10", "21841"  # classes
LARGE_BATCH = "32"


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
