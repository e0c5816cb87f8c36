"""Progress bars of library code on stderr, if rich is installed. A stream that fails does not end the program."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import IO, Any, cast

from .formatting import escaped


class Output:
    """Text stream that discards everything after its first error, so that a closed terminal does not end a run.

    Attributes:
        error: The first error, or None.
    """

    def __init__(self, file: IO[str] | None):
        self._file = io.StringIO() if file is None else file  # None: the descriptor was closed when Python started
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write, unless an earlier write failed."""
        self._try(self._file.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, unless an earlier write failed."""
        self._try(self._file.writelines, lines)

    def flush(self) -> None:
        """Flush, unless an earlier write failed."""
        self._try(self._file.flush)

    def _try(self, call: Callable[..., Any], *arguments: Any) -> None:
        if self.error is None:
            try:
                call(*arguments)
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self.error = error


@contextlib.contextmanager
def progress(title: object, total: int, *, shown: bool = True) -> Iterator[Callable[[float], None]]:
    """Show a progress bar on stderr; yield a function that advances it. Without rich it has no effect."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda count: None
        return
    console = Console(stderr=True)
    console.file = cast(IO[str], Output(console.file))
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not shown) as bars:
        yield partial(bars.advance, bars.add_task(escaped(title), total=total))
