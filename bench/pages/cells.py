"""Cells of the tables, the tables themselves in Markdown, their origin, and their place in a page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from ..rows import KINDS, Row, number

MACHINE_SHOWN = {"device": "AMD EPYC (avx2 avx512f avx512_bf16)"}  # times in tables and pictures are its
SHOWN = MACHINE_SHOWN | {"model": "ViT-B-16", "B": "4"}  # the steps in them


def figure(value: float | None, unit: str = "") -> str:
    """Three significant digits, or all digits before the point.

    >>> figure(0.2714), figure(12.71, " ms"), figure(48188.4), figure(9.996), figure(None, " ms")
    ('0.271', '12.7 ms', '48,188', '10.0', '')
    """
    if value is None:
        return ""
    rounded = abs(float(f"{value:.3g}"))
    decimals = max(0, 2 - math.floor(math.log10(rounded))) if rounded else 0
    return f"{value:,.{decimals}f}{unit}"


def times(value: float | None) -> str:
    """A ratio, in bold if it is below 1.

    >>> times(2.444), times(38.21), times(0.63), times(0.9971), times(0.9996), times(None)
    ('2.44', '38.2', '**0.63**', '**0.997**', '1.00', '')
    """
    if value is None:
        return ""
    if round(value, 3) < 1:
        return f"**{value:.{3 if value >= 0.995 else 2}f}**"
    return f"{value:,.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def timed(row: Row, divisor: float = 1, unit: str = "") -> str:
    """Milliseconds and, in brackets, our speed-up; without a measurement, the reason."""
    if not row["p50_ms"]:
        about = re.search(r"about [\d.]+ s", row["note"])
        reason = "not run" if row["note"].startswith("left out") else row["note"].split(":")[0]
        return f"{reason}: {about[0]}" if about and reason == "not run" else reason
    faster = times(number(row, "faster"))
    return figure(float(row["p50_ms"]) / divisor, unit) + (f" ({faster})" if faster else "")


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

    threads = "1 thread" if values("threads") == "1" else f"{values('threads')} threads"
    machine = f"{values('device')}, {threads}; torch {values('torch')}"
    commands = ", ".join(f"`python -m {KINDS[each].command}`" for each in kind.split())
    return f"\n\n<sub>{machine}; commit {values('commit')}; {commands}</sub>"


def filled(page: str, name: str, block: str) -> str:
    """A page with one block replaced.

    Raises:
        ValueError: If the page does not have exactly one place for the block.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    found = page.count(begin), page.count(end)
    if found != (1, 1) or page.index(end) < page.index(begin):
        raise ValueError(f"filled: a page must have {begin} and behind it {end} once; got {found[0]} and {found[1]}.")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
