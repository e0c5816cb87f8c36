"""Errors about arguments of `tune`, and about values that were read from a file."""

from __future__ import annotations

from typing import Any, TypeVar

from ..data.base import InputError

Parsed = TypeVar("Parsed")


def argument_error(argument: str, message: str) -> InputError:
    """Return an error about an argument.

    >>> argument_error("out", "runs/a is a file; choose a folder.")
    InputError('tune: out: runs/a is a file; choose a folder.')
    """
    return InputError(f"tune: {argument}: {message}", argument)


def validated(kind: type[Parsed], values: Any) -> Parsed:
    """Convert the values of a file to a class by pydantic.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Cost:
        ...     seconds: float
        >>> validated(Cost, {"seconds": "long"})
        Traceback (most recent call last):
        ValueError: seconds: Input should be a valid number, unable to parse string as a number
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or kind.__name__
        raise ValueError(f"{where}: {first['msg']}") from None
