"""Errors about arguments of `tune`."""

from __future__ import annotations

from ..data.base import InputError


def argument_error(argument: str, message: str) -> InputError:
    """Return an error about an argument.

    >>> argument_error("out", "runs/a is a file; choose a folder.")
    InputError('tune: out: runs/a is a file; choose a folder.')
    """
    return InputError(f"tune: {argument}: {message}", argument)
