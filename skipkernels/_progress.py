"""Progress bars of library code, on stderr: rich's if it is installed, else none."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any


def escaped(text: object) -> str:
    r"""Escape the characters that are not printable: control characters, and bytes that are not UTF-8.

    >>> escaped("a\x1b[31mb [/b] é\n")
    'a\\x1b[31mb [/b] é\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


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


def message(text: str) -> None:
    """Print a line on stderr; errors of the stream are ignored."""
    try:
        from . import console
    except ImportError:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{escaped(text)}\n")
    else:
        console.stderr().print(text, soft_wrap=True)


class NoProgress:
    """The part of rich.progress.Progress that library code uses, without output."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    start = stop = update = reset = add_task = lambda self, *args, **how: 0

    def track(self, values: Iterable[Any], description: str = "") -> Iterator[Any]:
        """Yield the values."""
        yield from values


def progress(*columns: str, **how: Any) -> Any:
    """Return a progress display on stderr, or a NoProgress without rich.

    Args:
        columns: Columns behind the bar: names of column classes in rich.progress, or the format of a text column.
        how: Options of rich.progress.Progress.
    """
    try:
        import rich.progress
    except ImportError:
        return NoProgress()
    from . import console

    made = [
        getattr(rich.progress, name)() if name.isidentifier() else rich.progress.TextColumn(name) for name in columns
    ]
    return console.progress(*made, console=console.stderr(), **how)
