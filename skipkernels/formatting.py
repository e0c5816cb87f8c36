"""Formatting of messages and tables: unprintable characters, errors in one line, times, sizes in bytes, and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from datetime import timedelta

_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def duration(seconds: float) -> str:
    """Format a time in whole seconds.

    >>> duration(83.4)
    '0:01:23'
    """
    return str(timedelta(seconds=round(seconds)))


def escaped(text: object) -> str:
    r"""Escape the characters that are not printable: control characters, and bytes that are not UTF-8.

    >>> escaped("a\x1b[31mb [/b] é\n")
    'a\\x1b[31mb [/b] é\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def first_line(error: BaseException) -> str:
    r"""Return the first line of the message of an error; the name of its type if it has none.

    >>> first_line(ValueError("too large\nin line 3")), first_line(KeyboardInterrupt())
    ('too large', 'KeyboardInterrupt')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def csv_line(cells: Iterable[object]) -> str:
    r"""Return a line of a CSV file. A text that a spreadsheet would read as a formula is prefixed by an apostrophe.

    >>> csv_line(["=1+1", "-a", "a-b", -0.5])
    "'=1+1,'-a,a-b,-0.5\n"
    """
    line = io.StringIO()
    safe = (f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in cells)
    csv.writer(line, lineterminator="\n").writerow(safe)
    return line.getvalue()


def csv_text(cell: str) -> str:
    """Return the text of a cell that `csv_line` wrote.

    >>> csv_text("'=1+1"), csv_text("'tis")
    ('=1+1', "'tis")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def decimal(size: int) -> str:
    """Return a number of bytes in decimal units.

    >>> decimal(1), decimal(999), decimal(30_000), decimal(2_500_000_000)
    ('1 byte', '999 bytes', '30.0 kB', '2.5 GB')
    """
    if size < 1000:
        return "1 byte" if size == 1 else f"{size} bytes"
    value, unit = size / 1000, "kB"
    for larger in ("MB", "GB", "TB", "PB", "EB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:,.1f} {unit}"
