"""Dataset types, and the error for unusable input."""

from __future__ import annotations

from typing import Any, Protocol

from ...formatting import escaped


class InputError(ValueError):
    """Input that can't be used; the message is one line with the reason and the remedy.

    Args:
        message: "function: argument must be …; got …. Remedy." or "function: what is wrong. Remedy."
        argument: Name of the invalid Python argument, which the command line translates into its flag; None if the
            error is not about an argument but, for instance, about a file.
    """

    def __init__(self, message: str, argument: str | None = None):
        # A DataLoader creates a worker's error again with its traceback as the message; its line breaks are kept.
        from_worker = message.startswith("Caught InputError in DataLoader")
        super().__init__(message if from_worker else escaped(message))
        self.argument = argument


def open_error(message: str, argument: str = "data") -> InputError:
    """Return an `InputError` of `open_source` about one of its arguments."""
    return InputError(f"open_source: {message}", argument)


class SizedDataset(Protocol):
    """A map-style dataset of (image, label) with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...
