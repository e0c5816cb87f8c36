"""Formatting of messages: unprintable characters, errors in one line, and sizes in bytes."""

from __future__ import annotations


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
