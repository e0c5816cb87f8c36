"""Consoles of the application: strings are printed literally, and a stream that fails does not end a run."""

from __future__ import annotations

import os
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

from .._progress import Output
from ..formatting import escaped

_UNLIMITED = 10_000  # columns


def plain(text: object, style: str = "") -> Text:
    """Return `escaped` text as a rich text, without markup, emoji codes and highlighting."""
    return Text(escaped(text), style)


def print_plain(console: Console, text: str) -> None:
    """Print a line like `plain`, without wrapping it."""
    console.print(plain(text), soft_wrap=True)


class Terminal(Console):
    """Rich console on an `Output` that shows every string like `plain`, but keeps line breaks.

    In a pipe or a file, tables are as wide as their content, unless COLUMNS is set.
    """

    def __init__(self, file: IO[str] | None, **options: Any):
        self.output = Output(file)
        super().__init__(file=cast(IO[str], self.output), markup=False, emoji=False, highlight=False, **options)
        if not self.is_terminal and "width" not in options and "COLUMNS" not in os.environ:
            self.width = _UNLIMITED

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string without markup."""
        return super().render_str("\n".join(map(escaped, text.split("\n"))), **options)
