"""Penalty of an anchored probe where no class has two images, so that none can be held out to choose it.

    python -m bench.when.penalty

Mean accuracies with each candidate of `heads.anchored_l2`, on the frozen model, for the task "one designer". The names
and seeds are those of the search, which no reported run has.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.progress import track

from skipkernels.app import heads
from skipkernels.app.heads import anchored

from .. import tables
from ..rows import RESULTS, command
from .accuracy import ACCURACIES, accuracies
from .plan import CANDIDATES, SEARCH_SEEDS, VARIANTS, Run
from .runs import setup_of
from .tasks import SHIFTS

TABLE = RESULTS / "when_penalty.csv"


class Row(NamedTuple):
    """Accuracies with a penalty, in per cent."""

    l2: str
    base: str
    new: str
    harmonic: str
    joint: str


def main(arguments: Sequence[str] | None = None) -> None:
    args = command(__doc__).parse_args(arguments)
    shift = next(shift for shift in SHIFTS if shift.name == "one designer")
    found: dict[float, list[dict[str, Any]]] = {l2: [] for l2 in anchored.CANDIDATES}
    for seed in track(SEARCH_SEEDS, "seeds"):
        setup = setup_of(Run(shift, "zero-shot", VARIANTS["zero-shot"], CANDIDATES["zero-shot"][0], "search", seed))
        tests = setup.test_features()
        examples = setup.examples(setup.train_features())
        for l2, runs in found.items():
            runs.append(accuracies(setup, setup.zero_shot, tests, heads.fit_head("anchored", examples, l2)))
    rows = [
        Row(f"{l2:g}", *(f"{statistics.fmean(run[name] for run in runs):.1f}" for name in ACCURACIES))
        for l2, runs in found.items()
    ]
    tables.show(Row._fields, rows)
    if not args.no_save:
        tables.write(TABLE, rows)


if __name__ == "__main__":
    main()
