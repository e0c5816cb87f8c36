"""What something would take, foreseen from two small ones: nobody has to run out of memory to learn it."""

from __future__ import annotations

from typing import NamedTuple

_MARGIN = 1.25  # of what is saved for backward; temporaries and gradients come on top
_MOST = 0.9  # of the memory that is free


class Probe(NamedTuple):
    """A small one: how many classes take part, its seconds, and the bytes that it saves for backward."""

    classes: int
    seconds: float
    saved: int


class Foresight(NamedTuple):
    """Seconds and bytes as straight lines over the classes that take part.

    Example:
        >>> line = Foresight.of(Probe(10, 2.0, 1000), Probe(20, 3.0, 2000))
        >>> line.seconds(50), line.saved(50), line.most_classes(8000)
        (6.0, 5000.0, 57)
    """

    first: Probe
    seconds_each: float
    saved_each: float

    @classmethod
    def of(cls, few: Probe, more: Probe) -> Foresight:
        """From two probes of different sizes."""
        classes = more.classes - few.classes
        each = max(0.0, (more.seconds - few.seconds) / classes), max(0.0, (more.saved - few.saved) / classes)
        return cls(few, *each)

    def seconds(self, classes: int) -> float:
        """Of one call with so many."""
        return self.first.seconds + (classes - self.first.classes) * self.seconds_each

    def saved(self, classes: int) -> float:
        """Bytes for backward with so many."""
        return self.first.saved + (classes - self.first.classes) * self.saved_each

    def fits(self, classes: int, free: float) -> bool:
        """Whether that many fit into so many free bytes."""
        return _MARGIN * self.saved(classes) <= _MOST * free

    def most_classes(self, free: float) -> int:
        """That fit into so many free bytes."""
        room = _MOST * free / _MARGIN - self.first.saved
        return self.first.classes + int(room / max(1.0, self.saved_each))
