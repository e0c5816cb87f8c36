"""What a dataset is here, and the error for what a user gave."""

from __future__ import annotations

from typing import Any, Protocol


def one_line(text: str) -> str:
    r"""A text with what can't be printed, such as line breaks in the name of a file, as escapes.

    >>> one_line("cat\n.png")
    'cat\\n.png'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class InputError(ValueError):
    """Something a user gave cannot be used; the message is one line that says what, and how to mend it."""

    def __init__(self, message: str):
        # A DataLoader raises it again, with the traceback of its worker, which has lines of its own.
        super().__init__(message if message.startswith("Caught InputError in DataLoader") else one_line(message))


class SizedDataset(Protocol):
    """A map-style dataset of (image, label) with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class LabelledDataset(SizedDataset, Protocol):
    """The same, with all labels at hand."""

    @property
    def labels(self) -> list[int]:
        """Of every item."""
