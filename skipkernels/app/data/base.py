"""`InputError`, the error for unusable input, and functions that raise or make it."""

from __future__ import annotations

from typing import Any, get_args

from ...formatting import escaped


class InputError(ValueError):
    """Input that can't be used; the message is "function: argument must be …; got …. Remedy." in one line.

    Args:
        reason: "must be …; got …. Remedy." after the name of the argument, or a sentence. Settings that it names are in
            backquotes, `name` or `name=value`.
        argument: Name of the invalid Python argument; None if the error is not about an argument but, for instance,
            about a file.
        function: Name of the function with this argument.
    """

    def __init__(self, reason: str, argument: str | None = None, function: str | None = None):
        super().__init__(reason, argument, function)  # by which a copy from another process is made
        # A DataLoader creates a worker's error again with its traceback as the reason; its line breaks are kept.
        self.reason = reason if reason.startswith("Caught InputError in DataLoader") else escaped(reason)
        self.argument, self.function = argument, function

    def about(self, argument: str | None) -> str:
        """Return the reason after this name of the argument."""
        if argument is None:
            return self.reason
        return f"{argument} {self.reason}" if self.reason.startswith("must ") else f"{argument}: {self.reason}"

    def __str__(self) -> str:
        message = self.about(self.argument)
        return message if self.function is None else f"{self.function}: {message}"


def check_choice(value: Any, literal: Any, argument: str, function: str) -> None:
    """Raise an InputError unless a value is one of a `Literal`."""
    if value not in (options := get_args(literal)):
        raise InputError(f"must be one of {', '.join(options)}; got {value!r}.", argument, function)


def open_error(message: str, argument: str = "data") -> InputError:
    """Return an `InputError` of `open_source` about one of its arguments."""
    return InputError(message, argument, "open_source")
