"""The table of README.md."""

from __future__ import annotations

from .. import step
from ..rows import PRECISIONS, Device, Row, number, same_run
from .cells import SHOWN, figure, origin, table, times

OURS = step.OURS
HEADLINE, FEW, MANY = "1000", "10", "21841"  # classes
LARGE_BATCH = "32"


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
