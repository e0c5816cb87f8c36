"""Atomic replacement of files."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..folders import sync

_PARTIAL = re.compile(r"\.(.+)\.(?:[0-9a-f]{16}\.skipkernels-partial|[0-9]+\.partial)")  # the second: older versions


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` with a temporary file in the same folder, flush it to the disk, and rename it to `path`.

    A crash at any moment leaves the old file or the new one, and possibly the temporary file (`partial_of`).

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> replace_file(folder / "note.txt", lambda file: file.write(b"whole"))
    >>> [file.name for file in folder.iterdir()]
    ['note.txt']
    """
    partial = path.with_name(_partial_name(path.name))
    with partial.open("xb") as file:  # O_EXCL: never an existing file or link
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # report the first error
                partial.unlink(missing_ok=True)
            raise
    sync(path.parent)  # flushes the rename


def replace_text(path: Path, text: str) -> None:
    """Replace a file by text in UTF-8, as `replace_file` does."""
    replace_file(path, lambda file: file.write(text.encode()))


def _partial_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.skipkernels-partial"


def partial_of(name: str) -> str | None:
    """Return the final name of a temporary file of `replace_file`; None for any other name.

    >>> partial_of(".state.pt.0123456789abcdef.skipkernels-partial"), partial_of(".mine.partial")
    ('state.pt', None)
    """
    found = _PARTIAL.fullmatch(name)
    return None if found is None else found[1]
