"""What a dataset is here, and the error for what a user gave."""

from __future__ import annotations

from typing import Any, Protocol


class InputError(ValueError):
    """Something a user gave cannot be used; the message is one line that says what, and how to mend it."""


class SizedDataset(Protocol):
    """A map-style dataset of (image, label) with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class LabelledDataset(SizedDataset, Protocol):
    """The same, with all labels at hand."""

    @property
    def labels(self) -> list[int]:
        """Of every item."""
