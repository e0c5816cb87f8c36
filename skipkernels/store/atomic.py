"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_PARTIAL = re.compile(r"\.(.+)\.(?:[0-9a-f]{16}\.skipkernels-partial|[0-9]+\.partial)")  # the second: of older versions


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name beside it, flush it to the disk, and rename it into place.

    A crash at any moment leaves the old file or the new one, and at worst the temporary one beside it (`partial_of`).

    Args:
        path: The file.
        write: Called with the temporary file, open for writing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> replace_file(folder / "note.txt", lambda file: file.write(b"whole"))
        >>> [file.name for file in folder.iterdir()]
        ['note.txt']
    """
    partial = path.with_name(_partial_name(path.name))
    with partial.open("xb") as file:  # O_EXCL: never a file or a link that is there
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to report
                partial.unlink(missing_ok=True)
            raise
    if os.name == "posix":  # the rename itself reaches the disk with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with a text in UTF-8."""
    replace_file(path, lambda file: file.write(text.encode()))


def _partial_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.skipkernels-partial"


def partial_of(name: str) -> str | None:
    """The name of the file that a temporary file of `replace_file` was to become; None for any other name.

    >>> partial_of(".state.pt.0123456789abcdef.skipkernels-partial"), partial_of(".mine.partial")
    ('state.pt', None)
    """
    found = _PARTIAL.fullmatch(name)
    return None if found is None else found[1]
