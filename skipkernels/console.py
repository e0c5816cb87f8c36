"""Terminal output: strings are printed literally, and write errors do not stop a run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TimeRemainingColumn
from rich.text import Text

from .formatting import escaped

_SPELLED = str.maketrans({"–": "-", "×": "x", "±": "+/-", "→": "->", "…": "...", "≥": ">=", "≤": "<=", "·": "*"})


def plain(text: object, style: str = "") -> Text:
    """Return `escaped` text as a rich text, without markup, emoji codes and highlighting."""
    return Text(escaped(text), style)


class Terminal(Console):
    """Rich console that shows every string like `plain`, but keeps line breaks.

    Write errors are not raised but stored in `output.error`.
    """

    def __init__(self, file: IO[str] | None, **options: Any):
        self.output: Output = Output.over(file)
        options = {"markup": False, "emoji": False, "highlight": False} | options
        super().__init__(file=cast(IO[str], self.output), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string without markup."""
        return super().render_str("\n".join(map(escaped, text.split("\n"))), **options)

    def write(self, data: str) -> None:
        """Write lines of data: on a terminal like `plain`, else as they are."""
        shown = "\n".join(map(escaped, data.split("\n"))) if self.is_terminal else data
        self.output.write(shown)


def stderr() -> Terminal:
    """Return a console on the current `sys.stderr`."""
    return Terminal(sys.stderr)


def progress(*columns: ProgressColumn, console: Console, **options: Any) -> Progress:
    """Return progress bars with literal names, followed by `columns`."""
    columns = columns or (TaskProgressColumn(), TimeRemainingColumn())
    return Progress(_NameColumn(), BarColumn(), *columns, console=console, **options)


class _NameColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Return the name of a bar."""
        return plain(task.description)


class Output:
    """Text stream that writes nothing after its first error, and replaces characters that its encoding lacks.

    Attributes:
        error: The first error, or None.
    """

    def __init__(self, file: IO[str]):
        self._file, self.error = file, cast(Exception | None, None)
        encoding = (getattr(file, "encoding", None) or "utf-8").lower()
        self._spelled_in = None if encoding.startswith("utf") else encoding
        self._is_terminal = self.isatty()

    @classmethod
    def over(cls, file: IO[str] | None) -> Any:
        """Wrap a stream, or the stream under a live display of rich; None discards all output."""
        file = getattr(file, "rich_proxied_file", file)
        return file if isinstance(file, Output) else cls(io.StringIO() if file is None else file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write, unless an earlier write failed."""
        if self.error is None:
            if self._spelled_in is not None:
                known = text.translate(_SPELLED).encode(self._spelled_in, "backslashreplace")
                text = known.decode(self._spelled_in)
            try:
                self._file.write(text)
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self.error = error
        return len(text)

    def flush(self) -> None:
        """Flush, unless an earlier write failed."""
        if self.error is None:
            try:
                self._file.flush()
            except (OSError, ValueError) as error:
                self.error = error

    def isatty(self) -> bool:
        """Return True if the stream is a terminal."""
        try:
            return self._file.isatty()
        except ValueError:
            return False

    @property
    def unread(self) -> bool:
        """True if nothing reads the stream: a pipe to a process that has ended, or a closed terminal."""
        gone = (errno.EPIPE, errno.EIO) if self._is_terminal else (errno.EPIPE,)
        return isinstance(self.error, OSError) and self.error.errno in gone

    def release(self) -> None:
        """Flush at the end of a process. Discard what cannot be written: Python would retry and print an error."""
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._file.fileno())
                os.close(null)


@contextlib.contextmanager
def standard_streams() -> Iterator[tuple[Terminal, Terminal]]:
    """Yield consoles on stdout and stderr, and send everything printed on these through an `Output`."""
    out, err = Terminal(sys.stdout), Terminal(sys.stderr)
    with contextlib.redirect_stdout(out.file), contextlib.redirect_stderr(err.file):
        try:
            yield out, err
        finally:
            out.output.release()
            err.output.release()


@contextlib.contextmanager
def ignore_write_errors(console: Console) -> Iterator[None]:
    """Ignore write errors of a console, so that a run continues after its terminal was closed."""
    file = console._file  # not `console.file`: None means that the console follows sys.stdout or sys.stderr
    console.file = Output.over(console.file)
    try:
        yield
    finally:
        console._file = file
