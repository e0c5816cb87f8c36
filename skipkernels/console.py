"""Terminal output: strings appear as they are, and an output that fails ends no work."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

_SPELLED = str.maketrans({"–": "-", "×": "x", "±": "+/-", "→": "->", "…": "...", "≥": ">=", "≤": "<=", "·": "*"})


def escaped(text: object) -> str:
    r"""A string whose characters that don't print are escaped: control characters, and bytes that are no UTF-8.

    >>> escaped("a\x1b[31mb [/b] é\n")
    'a\\x1b[31mb [/b] é\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def plain(text: object, style: str = "") -> Text:
    """A string for rich, shown as it is: without markup, emoji codes and highlighting, and `escaped`."""
    return Text(escaped(text), style)


class Terminal(Console):
    """A rich console that shows every string as `plain` does; line breaks remain.

    Errors in writing to its file are kept in `output.error` and not raised.
    """

    def __init__(self, file: IO[str] | None, **how: Any):
        self.output: Output = Output.over(file)
        how = {"markup": False, "emoji": False, "highlight": False} | how
        super().__init__(file=cast(IO[str], self.output), **how)

    def render_str(self, text: str, **how: Any) -> Text:
        """A string as rich.text.Text."""
        return super().render_str("\n".join(map(escaped, text.split("\n"))), **how)


def stderr() -> Terminal:
    """A console on the standard error stream as it is now."""
    return Terminal(sys.stderr)


def progress(*columns: ProgressColumn, console: Console, **how: Any) -> Progress:
    """Progress bars whose names are shown as they are, with `columns` behind them."""
    columns = columns or (TaskProgressColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(), *columns, console=console, **how)


class Output:
    """A text stream that is given up at the first error; characters that its encoding lacks are spelled out.

    Args:
        file: The stream.

    Attributes:
        error: What ended it.
    """

    def __init__(self, file: IO[str]):
        self._file, self.error = file, cast(Exception | None, None)
        encoding = (getattr(file, "encoding", None) or "utf-8").lower()
        self._spelled_in = None if encoding.startswith("utf") else encoding
        self._is_terminal = self.isatty()

    @classmethod
    def over(cls, file: IO[str] | None) -> Any:
        """Over a stream; below a live view over the stream that it covers. None, a closed one, shows nothing."""
        file = getattr(file, "rich_proxied_file", file)
        return file if isinstance(file, Output) else cls(io.StringIO() if file is None else file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write, unless an error came before."""
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
        """Flush, unless an error came before."""
        if self.error is None:
            try:
                self._file.flush()
            except (OSError, ValueError) as error:
                self.error = error

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._file.isatty()
        except ValueError:
            return False

    @property
    def unread(self) -> bool:
        """Whether its reader left: a pipe to a process that ended, a terminal that was closed."""
        gone = (errno.EPIPE, errno.EIO) if self._is_terminal else (errno.EPIPE,)
        return isinstance(self.error, OSError) and self.error.errno in gone

    def release(self) -> None:
        """Flush at the end of a process. What was not written is discarded: Python would try again, and complain."""
        self.flush()
        if self.error is not None:
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._file.fileno())
                os.close(null)


@contextlib.contextmanager
def standard_streams() -> Iterator[tuple[Terminal, Terminal]]:
    """Consoles on stdout and stderr. Until the end, all that is printed on these goes through an `Output`."""
    out, err = Terminal(sys.stdout), Terminal(sys.stderr)
    with contextlib.redirect_stdout(out.file), contextlib.redirect_stderr(err.file):
        try:
            yield out, err
        finally:
            out.output.release()
            err.output.release()


@contextlib.contextmanager
def kept_going(console: Console) -> Iterator[None]:
    """Errors in writing to a console are not raised, so that a run goes on when its terminal is gone."""
    file = console._file  # None where it follows sys.stdout or sys.stderr, as `console.file` does not tell
    console.file = Output.over(console.file)
    try:
        yield
    finally:
        console._file = file
