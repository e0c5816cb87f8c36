"""Predict the time and memory of a step from two small numbers of classes, so that large ones need not be tried."""

from __future__ import annotations

from typing import NamedTuple

_MARGIN = 1.25  # times the bytes saved for backward; temporaries and gradients are extra
_MOST = 0.9  # of the free memory


class Probe(NamedTuple):
    """A small measurement: number of kept classes, seconds, and bytes saved for backward."""

    classes: int
    seconds: float
    saved: int


class CostModel(NamedTuple):
    """Seconds and bytes as linear functions of the number of kept classes.

    Example:
        >>> line = CostModel.of(Probe(10, 2.0, 1000), Probe(20, 3.0, 2000))
        >>> line.seconds(50), line.saved(50), line.most_classes(8000)
        (6.0, 5000.0, 57)
    """

    first: Probe
    seconds_each: float
    saved_each: float

    @classmethod
    def of(cls, few: Probe, more: Probe) -> CostModel:
        """Fit two probes of different sizes."""
        classes = more.classes - few.classes
        each = max(0.0, (more.seconds - few.seconds) / classes), max(0.0, (more.saved - few.saved) / classes)
        return cls(few, *each)

    def seconds(self, classes: int) -> float:
        """Predicted seconds per call with this many kept classes."""
        return self.first.seconds + (classes - self.first.classes) * self.seconds_each

    def saved(self, classes: int) -> float:
        """Predicted bytes saved for backward with this many kept classes."""
        return self.first.saved + (classes - self.first.classes) * self.saved_each

    def fits(self, classes: int, free: float) -> bool:
        """True if this many kept classes fit into this many free bytes."""
        return _MARGIN * self.saved(classes) <= _MOST * free

    def most_classes(self, free: float) -> int:
        """The largest number of kept classes that fits into this many free bytes."""
        room = _MOST * free / _MARGIN - self.first.saved
        return self.first.classes + int(room / max(1.0, self.saved_each))
