"""Choice of the best epoch, and early stopping, by the validation accuracy in the rows of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def best_epoch(rows: Rows) -> int | None:
    """Return the epoch with the highest validation accuracy, of equal ones the last; None without validation.

    The last: with few validation images many epochs are equal, and those at the end of the schedule change least.

    >>> best_epoch([{"epoch": epoch, "validation": accuracy} for epoch, accuracy in ((1, 90.0), (2, 90.0), (3, 85.0))])
    2
    """
    measured = [(row["validation"], row["epoch"]) for row in rows if row.get("validation") is not None]
    return max(measured)[1] if measured else None


def has_stalled(rows: Rows, patience: int | None) -> bool:
    """Return True if the validation accuracy has not risen in the last `patience` epochs.

    >>> rows = [{"epoch": 1, "validation": 80.0}, {"epoch": 2, "validation": 80.0}, {"epoch": 3, "validation": 79.0}]
    >>> has_stalled(rows, 2), has_stalled(rows, 3), has_stalled(rows, None)
    (True, False, False)
    """
    accuracies = [row["validation"] for row in rows if row.get("validation") is not None]
    if patience is None or not accuracies:
        return False
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) >= patience
