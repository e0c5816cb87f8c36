"""Progress bars of library code, on stderr; none if rich is not installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from .formatting import escaped


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
    """Replacement of rich.progress.Progress without output, with the methods that library code uses."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    start = stop = update = advance = reset = add_task = lambda self, *args, **how: 0

    def track(self, values: Iterable[Any], total: float | None = None, *, description: str = "") -> Iterator[Any]:
        """Yield the values."""
        yield from values


def progress(*columns: str, **how: Any) -> Any:
    """Return a progress display on stderr, or a NoProgress if rich is not installed.

    Args:
        columns: Columns after the bar: names of column classes in rich.progress, or formats of text columns.
        how: Options of rich.progress.Progress.
    """
    try:
        import rich.progress
    except ImportError:
        return NoProgress()
    from . import console

    parts = [
        getattr(rich.progress, name)() if name.isidentifier() else rich.progress.TextColumn(name) for name in columns
    ]
    return console.progress(*parts, console=console.stderr(), **how)
